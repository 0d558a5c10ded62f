package store

import (
	"context"
	"fmt"
	"iter"
)

// Diff yields, ascending, the grains of m whose content differs from old's; Zero
// says that they hold zeroes in m. Beyond its end old counts as zeroes; what old
// has beyond the end of m is not mentioned. Only nodes that differ are read. Both must have
// grains of one size, else the error wraps ErrInvalid. After a non-nil error
// nothing follows.
func (m *Map) Diff(ctx context.Context, old *Map) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		if m.root.Grain != old.root.Grain {
			yield(Run{}, fmt.Errorf("%w: cannot compare grains of %d and %d bytes", ErrInvalid, m.root.Grain, old.root.Grain))
			return
		}
		j := joiner{yield: yield}
		d := differ{m.r, old.r, m.Grains(), &j}
		a, b := subtree{m.root.Ref, int(m.root.Level)}, subtree{old.root.Ref, int(old.root.Level)}
		var err error
		for b.level > a.level && err == nil { // the rest of old lies beyond the end
			b, err = b.child(ctx, old.r, b.level, 0)
		}
		if err == nil {
			err = d.walk(ctx, a.level, a, b, 0)
		}
		j.finish(0, err)
	}
}

// subtree is a node that may stand where a higher one is expected: then it is the
// first child of a chain of nodes that were never written, because the disk was
// smaller.
type subtree struct {
	ref   Ref
	level int
}

// child returns child i of s, seen as a node of the level given.
func (s subtree) child(ctx context.Context, r *reader, level, i int) (subtree, error) {
	switch {
	case s.ref.IsZero():
		return subtree{level: level - 1}, nil
	case s.level < level && i == 0:
		return s, nil
	case s.level < level:
		return subtree{level: level - 1}, nil
	}
	n, err := r.node(ctx, s.ref, uint8(level))
	if err != nil {
		return subtree{}, err
	}
	return subtree{n.child(i), level - 1}, nil
}

type differ struct {
	ra, rb *reader
	grains int64
	*joiner
}

func (d *differ) walk(ctx context.Context, level int, a, b subtree, first int64) error {
	// Equal hashes mean equal content, wherever it lies. (A node's hash covers
	// its level.)
	if a.ref.Hash == b.ref.Hash {
		return nil
	}
	if level < 0 {
		d.add(first, a.ref.IsZero())
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	for i := 0; i < fanOut && !d.stopped; i++ {
		at := first + int64(i)*span(level)
		if at >= d.grains {
			return nil
		}
		ca, err := a.child(ctx, d.ra, level, i)
		if err != nil {
			return err
		}
		cb, err := b.child(ctx, d.rb, level, i)
		if err != nil {
			return err
		}
		if err := d.walk(ctx, level-1, ca, cb, at); err != nil {
			return err
		}
	}
	return nil
}
