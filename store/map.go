package store

import (
	"context"
	"fmt"
	"iter"
)

// Map leads from the number of a grain to its place, for one disk of one point.
// It is immutable and reads its nodes when they are needed, through the
// repository's bounded cache. Safe for concurrent use; it lives as long as the
// [Repo].
type Map struct {
	r    *reader
	root Root
}

// Map returns the map of a disk. It reads nothing yet.
func (r *Repo) Map(root Root) (*Map, error) { return r.newMap(root) }

func (r *reader) newMap(root Root) (*Map, error) {
	if err := root.validate(); err != nil {
		return nil, err
	}
	return &Map{r: r, root: root}, nil
}

// Root returns the root that m was made from.
func (m *Map) Root() Root { return m.root }

// Grains is the number of grains of the disk. The last one may reach past the
// disk's end; there it holds zeroes.
func (m *Map) Grains() int64 { return m.root.grains() }

// Lookup returns the place of a grain, from 0 to Grains()-1. The zero Ref means
// zeroes.
func (m *Map) Lookup(ctx context.Context, grain int64) (Ref, error) {
	if grain < 0 || grain >= m.Grains() {
		return Ref{}, fmt.Errorf("%w: grain %d of a disk of %d", ErrInvalid, grain, m.Grains())
	}
	ref := m.root.Ref
	for level := int(m.root.Level); level >= 0 && !ref.IsZero(); level-- {
		n, err := m.r.node(ctx, ref, uint8(level))
		if err != nil {
			return Ref{}, err
		}
		ref = n.child(int(grain>>(fanOutBits*level)) & (fanOut - 1))
	}
	return ref, ctx.Err()
}

// Run is a run of grains, by number: [From, To).
type Run struct {
	From, To int64
	Zero     bool // every byte is zero
}

// Runs yields ascending runs that cover [from, to), cut to the disk.
// Neighbours differ in kind. Parts of the map without data are not visited. After
// a non-nil error nothing follows.
func (m *Map) Runs(ctx context.Context, from, to int64) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		from, to := max(from, 0), min(to, m.Grains())
		if from >= to {
			return
		}
		j := joiner{yield: yield, at: from, fill: true}
		err := m.runs(ctx, m.root.Ref, int(m.root.Level), 0, from, to, &j)
		j.finish(to, err)
	}
}

// runs reports the grains that are present below a node whose first grain is
// first.
func (m *Map) runs(ctx context.Context, ref Ref, level int, first, from, to int64, j *joiner) error {
	if ref.IsZero() {
		return nil
	}
	n, err := m.r.node(ctx, ref, uint8(level))
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	step := span(level)
	lo, hi := 0, fanOut
	if from > first {
		lo = int((from - first) / step)
	}
	if end := first + fanOut*step; to < end {
		hi = int((to - first + step - 1) / step)
	}
	for i := lo; i < hi && !j.stopped; i++ {
		at, c := first+int64(i)*step, n.child(i)
		if c.IsZero() {
			continue
		}
		if level == 0 {
			j.add(at, false)
		} else if err := m.runs(ctx, c, level-1, at, from, to, j); err != nil {
			return err
		}
	}
	return nil
}

// joiner makes runs of single grains, ascending. With fill, the gaps between
// them are runs of zeroes.
type joiner struct {
	yield   func(Run, error) bool
	at      int64 // where the next run begins, if fill
	fill    bool
	run     Run // not yielded yet; empty if From == To
	stopped bool
}

func (j *joiner) add(grain int64, zero bool) {
	if j.run.From != j.run.To && j.run.To == grain && j.run.Zero == zero {
		j.run.To++
		return
	}
	j.flush()
	if j.fill && grain > j.at {
		j.emit(Run{From: j.at, To: grain, Zero: true})
	}
	j.run = Run{From: grain, To: grain + 1, Zero: zero}
}

func (j *joiner) flush() {
	if j.run.From == j.run.To {
		return
	}
	j.at = j.run.To
	j.emit(j.run)
	j.run = Run{}
}

func (j *joiner) emit(r Run) { j.stopped = j.stopped || !j.yield(r, nil) }

// finish yields what is left, or the error after what was found before it.
func (j *joiner) finish(to int64, err error) {
	j.flush()
	switch {
	case j.stopped:
	case err != nil:
		j.yield(Run{}, err)
	case j.fill && j.at < to:
		j.emit(Run{From: j.at, To: to, Zero: true})
	}
}
