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
		if err == nil && a.ref.Hash != b.ref.Hash {
			err = d.walk(ctx, a.level, []pair{{a, b, 0}})
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

// pair is the same part of both maps, which differs; first is its first grain.
type pair struct {
	a, b  subtree
	first int64
}

// walk reports what differs below the pairs, which are nodes of one level, ascending.
func (d *differ) walk(ctx context.Context, level int, pairs []pair) error {
	for len(pairs) > 0 && !d.stopped {
		if err := ctx.Err(); err != nil {
			return err
		}
		// More and more of them: the first difference may be all that is wanted.
		some := pairs[:min(d.ahead(), len(pairs))]
		pairs = pairs[len(some):]
		d.load(ctx, level, some)
		below, err := d.expand(ctx, level, some)
		if level > 0 {
			if err := d.walk(ctx, level-1, below); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// expand returns the children of pairs that differ; leaves are reported instead. With an
// error come those before it.
func (d *differ) expand(ctx context.Context, level int, pairs []pair) (below []pair, err error) {
	for _, p := range pairs {
		as, err := p.a.children(ctx, d.ra, level)
		if err != nil {
			return below, err
		}
		bs, err := p.b.children(ctx, d.rb, level)
		if err != nil {
			return below, err
		}
		lo, hi := within(level, p.first, d.from, d.to)
		for i := lo; i < hi && !d.stopped; i++ {
			a, b := as(i), bs(i)
			switch at := p.first + int64(i)*span(level); {
			case a.ref.Hash == b.ref.Hash:
				// Equal hashes mean equal content, wherever it lies. (A node's
				// hash covers its level.)
			case level == 0:
				d.add(at, a.ref.IsZero())
			default:
				below = append(below, pair{a, b, at})
			}
		}
	}
	return below, nil
}

// load brings the nodes of pairs into the cache.
func (d *differ) load(ctx context.Context, level int, pairs []pair) {
	var ra, rb []Ref
	for _, p := range pairs {
		if !p.a.ref.IsZero() && p.a.level == level {
			ra = append(ra, p.a.ref)
		}
		if !p.b.ref.IsZero() && p.b.level == level {
			rb = append(rb, p.b.ref)
		}
	}
	if d.ra == d.rb {
		ra, rb = append(ra, rb...), nil
	}
	if len(ra) > 1 {
		d.ra.loadNodes(ctx, ra)
	}
	if len(rb) > 1 {
		d.rb.loadNodes(ctx, rb)
	}
}
