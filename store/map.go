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

// Refs fills dst with the places of the grains from the given one on, as Lookup
// would, with few requests. All of them must lie on the disk.
func (m *Map) Refs(ctx context.Context, from int64, dst []Ref) error {
	to := from + int64(len(dst))
	if from < 0 || to > m.Grains() {
		return fmt.Errorf("%w: grains [%d, %d) of a disk of %d", ErrInvalid, from, to, m.Grains())
	}
	clear(dst)
	if len(dst) == 0 {
		return ctx.Err()
	}
	return m.refs(ctx, m.root.Ref, int(m.root.Level), 0, from, dst)
}

func (m *Map) refs(ctx context.Context, ref Ref, level int, first, from int64, dst []Ref) error {
	if ref.IsZero() {
		return ctx.Err()
	}
	n, err := m.r.node(ctx, ref, uint8(level))
	if err != nil {
		return err
	}
	lo, hi := within(level, first, from, from+int64(len(dst)))
	if level > 0 {
		m.r.loadChildren(ctx, n, lo, hi)
	}
	for i := lo; i < hi; i++ {
		at, c := first+int64(i)*span(level), n.child(i)
		if level == 0 {
			dst[at-from] = c
			continue
		}
		if err := m.refs(ctx, c, level-1, at, from, dst); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// within returns the children [lo, hi) of a node whose first grain is first that
// have grains of [from, to).
func within(level int, first, from, to int64) (lo, hi int) {
	step := span(level)
	lo, hi = 0, fanOut
	if from > first {
		lo = int((from - first) / step)
	}
	if to < first+fanOut*step {
		hi = int((to - first + step - 1) / step)
	}
	return lo, hi
}

// loadChildren brings the children [lo, hi) of n into the cache if they are more
// than one.
func (r *reader) loadChildren(ctx context.Context, n *node, lo, hi int) {
	if hi-lo < 2 {
		return
	}
	var refs []Ref
	for i := lo; i < hi; i++ {
		if c := n.child(i); !c.IsZero() {
			refs = append(refs, c)
		}
	}
	if len(refs) > 1 {
		r.loadNodes(ctx, refs)
	}
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
	lo, hi := within(level, first, from, to)
	loaded := lo
	for i := lo; i < hi && !j.stopped; i++ {
		if level > 0 && i == loaded {
			// More and more of them: the first run may be all that is wanted.
			loaded = min(hi, i+j.ahead())
			m.r.loadChildren(ctx, n, i, loaded)
		}
		at, c := first+int64(i)*span(level), n.child(i)
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
	window  int // nodes loaded at once
}

// ahead tells how many nodes to load at once: 1, 2, 4, ... fanOut.
func (j *joiner) ahead() int {
	j.window = min(max(2*j.window, 1), fanOut)
	return j.window
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
