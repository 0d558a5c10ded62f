package restore

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// ErrIncomparable is wrapped when two disks cannot be compared by their maps.
var ErrIncomparable = errors.New("disks cannot be compared by their maps")

// Change is a run of bytes in which a disk may differ from an older one.
type Change struct {
	Off  int64 // bytes from the start of the disk
	Len  int64 // bytes, never 0
	Zero bool  // true: every byte reads as zero now
}

// Differ is implemented by disks that know where they differ from a disk of the
// same repository without reading either.
type Differ interface {
	// Diff yields ascending runs of [off, off+n), cut to the disk's size. What
	// lies in none of them reads the same from both disks; beyond its end, old
	// counts as zeroes. Inside of a run single bytes may be the same: runs end
	// where grains do, or blocks of an overlay. After a non-nil error nothing
	// follows; it wraps [ErrIncomparable] if old is no disk of a point, or one of
	// another repository.
	//
	// Only the parts of the two maps are read that differ.
	Diff(ctx context.Context, old Disk, off, n int64) iter.Seq2[Change, error]
}

var (
	_ Differ = (*PointDisk)(nil)
	_ Differ = (*Overlay)(nil)
)

// Diff implements [Differ]. Where the two disks have grains of different sizes,
// all that is not zero in both counts as changed.
func (d *PointDisk) Diff(ctx context.Context, old Disk, off, n int64) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		from, to, err := extentSpan(off, n, d.root.Size)
		if err == nil {
			err = ctx.Err()
		}
		var was *PointDisk
		if err == nil {
			was, err = d.comparable(old)
		}
		if err != nil {
			yield(Change{}, err)
			return
		}
		if from == to {
			return
		}
		if was.root.Grain != d.root.Grain {
			d.diffExtents(ctx, was, from, to, yield)
			return
		}
		grain := int64(d.root.Grain)
		for r, err := range d.src.(repoSource).Diff(ctx, was.src.(repoSource).Map, from/grain, d.grains(to)) {
			if err != nil {
				yield(Change{}, fmt.Errorf("%s: maps: %w", d.name, err))
				return
			}
			begin, end := max(r.From*grain, from), min(r.To*grain, to)
			if !yield(Change{Off: begin, Len: end - begin, Zero: r.Zero}, nil) {
				return
			}
		}
	}
}

// comparable returns old as a disk whose map can be compared with that of d.
func (d *PointDisk) comparable(old Disk) (*PointDisk, error) {
	was, ok := old.(*PointDisk)
	if !ok {
		return nil, fmt.Errorf("%s: %w: the other is no disk of a point", d.name, ErrIncomparable)
	}
	a, okA := d.src.(repoSource)
	b, okB := was.src.(repoSource)
	// Other repositories may name the same content otherwise.
	if !okA || !okB || a.repo.ID() != b.repo.ID() {
		return nil, fmt.Errorf("%s: %w: not of one repository", d.name, ErrIncomparable)
	}
	return was, nil
}

// diffExtents yields what holds data in one of the disks at least.
func (d *PointDisk) diffExtents(ctx context.Context, was *PointDisk, from, to int64, yield func(Change, error) bool) {
	for e, err := range d.Extents(ctx, from, to-from) {
		if err != nil {
			yield(Change{}, err)
			return
		}
		if !e.Zero {
			if !yield(Change{Off: e.Off, Len: e.Len}, nil) {
				return
			}
			continue
		}
		for o, err := range was.Extents(ctx, e.Off, e.Len) { // cut to its size: zeroes behind
			if err != nil {
				yield(Change{}, err)
				return
			}
			if !o.Zero && !yield(Change{Off: o.Off, Len: o.Len, Zero: true}, nil) {
				return
			}
		}
	}
}

// Diff implements [Differ]: what was written to the overlay counts as changed, and
// the rest is as in the base. The error wraps [ErrIncomparable] also if the base
// is no Differ.
func (o *Overlay) Diff(ctx context.Context, old Disk, off, n int64) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		at, to, err := extentSpan(off, n, o.shape.size)
		base, ok := o.base.(Differ)
		if err == nil && !ok {
			err = fmt.Errorf("overlay: %w: its base is no disk of a point", ErrIncomparable)
		}
		if err != nil {
			yield(Change{}, err)
			return
		}
		own := &extentMerger{yield: func(e Extent, err error) bool { return yield(Change(e), err) }}
		for at < to {
			if err := ctx.Err(); err != nil {
				yield(Change{}, err)
				return
			}
			set, endBlock := o.bits.run(at/overlayBlock, (to+overlayBlock-1)/overlayBlock)
			end := min(endBlock*overlayBlock, to)
			if set {
				if !o.ownExtents(ctx, own, at, end) || !own.flush() {
					return
				}
			} else {
				for c, err := range base.Diff(ctx, old, at, end-at) {
					if !yield(c, err) || err != nil {
						return
					}
				}
			}
			at = end
		}
	}
}
