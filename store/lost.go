package store

import (
	"context"
	"errors"
	"slices"
)

// findLost walks the map that the disk continues, if any record is known to be lost, for what of it needs such
// a one or can't be reached. Not through the cache of nodes: they may be damaged since.
func (d *DiskWriter) findLost(ctx context.Context) error {
	if d.parent == nil || d.w.lost == nil {
		return nil
	}
	root := d.parent.root
	return d.lostBelow(ctx, root.Ref, int(root.Level), 0)
}

func (d *DiskWriter) lostBelow(ctx context.Context, ref Ref, level int, first int64) error {
	if ref.IsZero() {
		return ctx.Err()
	}
	if d.w.lost.has(ref) {
		d.lose(first, fanOut*span(level))
		return ctx.Err()
	}
	n, err := d.w.repo.loadNode(ctx, ref)
	switch {
	case errors.Is(err, ErrCorrupt):
		d.lose(first, fanOut*span(level))
		return ctx.Err()
	case err != nil:
		return err
	}
	for i := range fanOut {
		at, c := first+int64(i)*span(level), n.child(i)
		switch {
		case level > 0:
			if err := d.lostBelow(ctx, c, level-1, at); err != nil {
				return err
			}
		case !c.IsZero() && d.w.lost.has(c):
			d.lose(at, 1)
		}
	}
	return ctx.Err()
}

// lose enters grains that are lost, in ascending order.
func (d *DiskWriter) lose(first, n int64) {
	g := int64(d.opt.Grain)
	off := first * g
	if off >= d.shape.Size {
		return
	}
	length := min(n*g, d.shape.Size-off)
	if k := len(d.lost); k > 0 && d.lost[k-1].Off+d.lost[k-1].Len == off {
		d.lost[k-1].Len += length
		return
	}
	d.lost = append(d.lost, Covered{off, length})
}

// isLost tells whether what the disk continues is lost at grain n.
func (d *DiskWriter) isLost(n int64) bool {
	off := n * int64(d.opt.Grain)
	i, there := slices.BinarySearchFunc(d.lost, off, func(c Covered, off int64) int {
		switch {
		case c.Off+c.Len <= off:
			return -1
		case c.Off > off:
			return 1
		}
		return 0
	})
	return there && i >= 0
}

// Lost returns the extents of what the disk continues that are known to be lost in the repository, or that no map
// leads to any more; ascending and apart, whole grains but for the end. What is written there is
// stored anew, whatever the parent's map says. Unless all of it is written, the point inherits the loss.
func (d *DiskWriter) Lost() []Covered { return slices.Clone(d.lost) }
