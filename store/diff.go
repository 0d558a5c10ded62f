package store

import (
	"context"
	"fmt"
	"iter"
)

// Diff yields, ascending, the grains of [from, to), cut to the disk, whose content
// differs from old's; Zero says that they hold zeroes in m. Beyond its end old counts
// as zeroes; what old has beyond the end of m is not mentioned. Only nodes that differ
// are read, at most some of them in vain if the consumer stops. Both must have
// grains of one size, else the error wraps ErrInvalid. After a non-nil error
// nothing follows.
func (m *Map) Diff(ctx context.Context, old *Map, from, to int64) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		from, to := max(from, 0), min(to, m.Grains())
		if from >= to {
			return
		}
		if m.root.Grain != old.root.Grain {
			yield(Run{}, fmt.Errorf("%w: cannot compare grains of %d and %d bytes", ErrInvalid, m.root.Grain, old.root.Grain))
			return
		}
		j := joiner{yield: yield}
		d := differ{m.r, old.r, from, to, &j}
		a, b := subtree{m.root.Ref, int(m.root.Level)}, subtree{old.root.Ref, int(old.root.Level)}
		var err error
		for b.level > a.level && err == nil { // the rest of old lies beyond the end
			var children func(int) subtree
			if children, err = b.children(ctx, old.r, b.level); err == nil {
				b = children(0)
			}
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

// children returns the children of s by their numbers, s seen as a node of the
// level given.
func (s subtree) children(ctx context.Context, r *reader, level int) (func(i int) subtree, error) {
	none := subtree{level: level - 1}
	switch {
	case s.ref.IsZero():
		return func(int) subtree { return none }, nil
	case s.level < level:
		return func(i int) subtree {
			if i == 0 {
				return s
			}
			return none
		}, nil
	}
	n, err := r.node(ctx, s.ref, uint8(level))
	if err != nil {
		return nil, err
	}
	return func(i int) subtree { return subtree{n.child(i), level - 1} }, nil
}

type differ struct {
	ra, rb   *reader
	from, to int64
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
	as, err := a.children(ctx, d.ra, level)
	if err != nil {
		return err
	}
	bs, err := b.children(ctx, d.rb, level)
	if err != nil {
		return err
	}
	lo, hi := within(level, first, d.from, d.to)
	loaded := lo
	for i := lo; i < hi && !d.stopped; i++ {
		ca, cb := as(i), bs(i)
		if level > 0 && i >= loaded && ca.ref.Hash != cb.ref.Hash {
			loaded = d.load(ctx, level, i, hi, as, bs)
		}
		if err := d.walk(ctx, level-1, ca, cb, first+int64(i)*span(level)); err != nil {
			return err
		}
	}
	return nil
}

// load brings the next children of [i, hi) that differ into the cache, and returns
// where those begin that it did not look at.
func (d *differ) load(ctx context.Context, level, i, hi int, as, bs func(int) subtree) int {
	var ra, rb []Ref
	// More and more of them: the first difference may be all that is wanted.
	for left := d.ahead(); i < hi && left > 0; i++ {
		ca, cb := as(i), bs(i)
		if ca.ref.Hash == cb.ref.Hash {
			continue
		}
		left--
		if !ca.ref.IsZero() && ca.level == level-1 {
			ra = append(ra, ca.ref)
		}
		if !cb.ref.IsZero() && cb.level == level-1 {
			rb = append(rb, cb.ref)
		}
	}
	if len(ra) > 1 {
		d.ra.loadNodes(ctx, ra)
	}
	if len(rb) > 1 {
		d.rb.loadNodes(ctx, rb)
	}
	return i
}
