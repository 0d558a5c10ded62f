package store

import (
	"context"
	"errors"
)

// Zero replaces n bytes at off by zeroes, as [DiskWriter.Write] would: the same rules hold. What it costs depends
// on what is there, not on n.
func (d *DiskWriter) Zero(ctx context.Context, off, n int64) error {
	end, err := d.w.begin()
	if err != nil {
		return err
	}
	defer end()
	if err := d.validRange(off, n); err != nil {
		return err
	}
	g := int64(d.opt.Grain)
	from, to := off/g, (off+n+g-1)/g
	zeroes := make([]byte, g)
	all := func(from, to int64) error {
		for ; from < to; from++ {
			if err := d.writeGrain(ctx, from, zeroes); err != nil {
				return d.failed(from, err)
			}
		}
		return nil
	}
	written, err := d.leavesIn(ctx, from>>fanOutBits, (to-1)>>fanOutBits)
	if err != nil {
		return err
	}
	for _, i := range written {
		if err := all(max(from, i<<fanOutBits), min(to, (i+1)<<fanOutBits)); err != nil {
			return err
		}
	}
	if d.parent == nil {
		return nil
	}
	for run, err := range d.parent.Runs(ctx, from, min(to, d.parent.Grains())) {
		switch {
		case errors.Is(err, ErrCorrupt):
			return all(from, to) // what is there can't be known
		case err != nil:
			return err
		case run.Zero:
			continue
		}
		if err := all(run.From, run.To); err != nil {
			return err
		}
	}
	return nil
}

// leavesIn are the leaves from first to last that were written to.
func (d *DiskWriter) leavesIn(ctx context.Context, first, last int64) ([]int64, error) {
	if err := d.edit.lock(ctx); err != nil {
		return nil, err
	}
	defer d.edit.unlock()
	var out []int64
	if last-first < int64(len(d.leaves)) {
		for i := first; i <= last; i++ {
			if d.leaves[i] != nil {
				out = append(out, i)
			}
		}
		return out, nil
	}
	for i := range d.leaves {
		if i >= first && i <= last {
			out = append(out, i)
		}
	}
	return out, nil
}
