package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// ordinals is a set of records of one pack: one bit each.
type ordinals []uint64

// add puts ord in and tells whether it was not there. The set grows with it.
func (o *ordinals) add(ord uint32) bool {
	w, bit := int(ord>>6), uint64(1)<<(ord&63)
	if w >= len(*o) {
		*o = append(*o, make([]uint64, w+1-len(*o))...)
	}
	if (*o)[w]&bit != 0 {
		return false
	}
	(*o)[w] |= bit
	return true
}

func (o ordinals) has(ord uint32) bool {
	w := int(ord >> 6)
	return w < len(o) && o[w]&(1<<(ord&63)) != 0
}

func (o ordinals) count() (n int) {
	for _, w := range o {
		n += bits.OnesCount64(w)
	}
	return n
}

// marks are the records that something refers to. Memory: one bit per record and
// some 100 bytes per pack: for 16 TiB stored as grains of 64 KiB 32 MiB, and 50 MiB
// for its packs.
type marks struct {
	mu   sync.Mutex
	sets map[PackID]*ordinals
}

func newMarks() *marks { return &marks{sets: map[PackID]*ordinals{}} }

// add marks refs and tells whether the last of them was not marked.
func (m *marks) add(refs ...Ref) (fresh bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, ref := range refs {
		s := m.sets[ref.Pack]
		if s == nil {
			s = new(ordinals)
			m.sets[ref.Pack] = s
		}
		fresh = s.add(ref.Ord)
	}
	return fresh
}

// has tells whether ref is marked; nothing is in nil.
func (m *marks) has(ref Ref) bool {
	if m == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.sets[ref.Pack]
	return s != nil && s.has(ref.Ord)
}

func (m *marks) of(id PackID) ordinals {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := m.sets[id]; s != nil {
		return *s
	}
	return nil
}

// Bounds of marking.
const (
	// nodesAtOnce is how many nodes are read with one call. Memory: what they refer to, 4 MiB for each
	// level of a map.
	nodesAtOnce = 1024
	// pointsAtOnce is how many points are walked together: what lies on one level of their maps is asked for
	// together.
	pointsAtOnce = 64
)

// marker marks all that roots lead to. A node that is walked is not read again, so
// that subtrees which points share are read once. Not for concurrent use.
type marker struct {
	*marks
	walked *marks // nodes. A mark alone says nothing: a leaf may call somebody's node a grain
	r      *reader
	seen   map[string]struct{} // points that were marked, by object
	// Sessions found to need nothing, see isPointless.
	pointless map[string]bool
	readOnly  bool
	nodes     func(n int64) // told how many nodes were read; may be nil
	read      int64
}

func newMarker(r *reader) *marker {
	m := &marker{r: r, pointless: map[string]bool{}}
	m.forget()
	return m
}

// forget begins anew with nothing marked.
func (m *marker) forget() {
	m.marks, m.walked, m.seen = newMarks(), newMarks(), map[string]struct{}{}
}

// roots marks all that is below roots. Any damage on the way is an error: it is not known what lies
// below it.
func (m *marker) roots(ctx context.Context, roots []rootRef) error {
	var levels [maxLevel + 1][]Ref
	for _, root := range roots {
		if int(root.Level) > maxLevel {
			return recordError(root.Ref, fmt.Sprintf("a root of level %d", root.Level))
		}
		if err := inAnyPack(root.Ref); err != nil {
			return err
		}
		levels[root.Level] = append(levels[root.Level], root.Ref)
	}
	for level, refs := range levels {
		if err := m.walk(ctx, m.fresh(nil, refs), level); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// inAnyPack refuses what no pack can have: marks would take as much memory as a number that anybody wrote says.
func inAnyPack(ref Ref) error {
	if ref.Ord >= maxPackEntries {
		return recordError(ref, fmt.Sprintf("no pack has more than %d", maxPackEntries))
	}
	return nil
}

// fresh marks nodes and appends those to list that were not walked.
func (m *marker) fresh(list, refs []Ref) []Ref {
	for _, ref := range refs {
		if !ref.IsZero() && m.walked.add(ref) {
			m.add(ref)
			list = append(list, ref)
		}
	}
	return list
}

// walk marks what is below nodes of one level that fresh gave.
func (m *marker) walk(ctx context.Context, refs []Ref, level int) error {
	for part := range slices.Chunk(refs, nodesAtOnce) {
		nodes, err := m.load(ctx, part, level)
		if err != nil {
			return err
		}
		if level == 0 {
			for _, n := range nodes {
				m.add(n.refs...)
			}
			continue
		}
		var below []Ref
		for _, n := range nodes {
			below = m.fresh(below, n.refs)
		}
		if err := m.walk(ctx, below, level-1); err != nil {
			return err
		}
	}
	return nil
}

// load reads nodes with few requests; not through the cache of nodes: each is read once.
func (m *marker) load(ctx context.Context, refs []Ref, level int) ([]*node, error) {
	nodes, errs := m.r.readNodes(ctx, refs)
	for i, n := range nodes {
		err := errs[i]
		if err == nil && int(n.level) != level {
			err = recordError(refs[i], fmt.Sprintf("a map node of level %d, not %d", n.level, level))
		}
		for k := 0; err == nil && k < len(n.refs); k++ {
			err = inAnyPack(n.refs[k])
		}
		if err != nil {
			return nil, err
		}
	}
	m.read += int64(len(nodes))
	if m.nodes != nil {
		m.nodes(m.read)
	}
	return nodes, ctx.Err()
}

// live marks from all points, checkpoints and then from all sessions, in this order: a point that was
// deleted before the points are listed is named by the session of whoever builds on it.
// It returns the sessions. A second call walks only what is new.
//
// Whose object is deleted while it is walked may lose what lies below. Then all
// begins anew: what was marked on that way was not walked to its end, and another
// point may share it.
func (m *marker) live(ctx context.Context, r *Repo) ([]*sessionState, error) {
	for try := 0; ; try++ {
		sessions, gone, err := m.liveOnce(ctx, r)
		if err == nil || !gone || try == 20 {
			return sessions, err
		}
		m.forget()
	}
}

// liveOnce tells, with an error, whether what could not be walked is gone.
func (m *marker) liveOnce(ctx context.Context, r *Repo) (_ []*sessionState, gone bool, _ error) {
	names, err := r.allPoints(ctx)
	if err != nil {
		return nil, false, err
	}
	names = slices.DeleteFunc(names, func(n PointName) bool { _, ok := m.seen[r.pointObject(n)]; return ok })
	for some := range slices.Chunk(names, pointsAtOnce) {
		if gone, err := m.points(ctx, r, some); err != nil {
			return nil, gone, err
		}
	}
	partials, err := r.partials(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, p := range partials { // not needed: only so that a backup can go on
		if m.pointless[p.object] || !time.Now().Before(p.Expires) {
			continue
		}
		if err := m.roots(ctx, p.roots()); err != nil {
			m.pointless[p.object] = true
			return nil, ctx.Err() == nil, unknownNeeds(p.object, err)
		}
	}
	sessions, err := r.sessions(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, s := range sessions {
		if m.pointless[s.name] {
			continue
		}
		if err := m.roots(ctx, s.roots()); err != nil {
			return nil, m.isPointless(ctx, r, s), unknownNeeds(s.name, err)
		}
	}
	return sessions, false, nil
}

// unknownNeeds is what ends a collection: what somebody needs is not known.
func unknownNeeds(what string, err error) error {
	return fmt.Errorf("%s: what it needs can't be told, so nothing is deleted: %w", what, err)
}

// points marks all that is below points that still exist. It tells, with an error, whether a point is gone that
// can't be followed.
func (m *marker) points(ctx context.Context, r *Repo, names []PointName) (gone bool, _ error) {
	roots := make([][]rootRef, len(names)) // nil: it is gone
	errs := make([]error, len(names))
	var g errgroup.Group
	g.SetLimit(maxRequests)
	for i, n := range names {
		g.Go(func() error {
			p, err := r.Point(ctx, n)
			if err == nil {
				roots[i] = append([]rootRef{}, rootRefs(p)...)
			} else if !errors.Is(err, ErrNotFound) { // else it was deleted since
				errs[i] = err
			}
			return nil
		})
	}
	_ = g.Wait() // errors are in errs
	for i, err := range errs {
		if err != nil {
			return r.isDeleted(ctx, r.pointObject(names[i])), unknownNeeds(names[i].String(), err)
		}
	}
	if err := m.roots(ctx, slices.Concat(roots...)); err != nil {
		return m.blame(ctx, r, names, roots, err)
	}
	for i, n := range names {
		if roots[i] != nil {
			m.seen[r.pointObject(n)] = struct{}{}
		}
	}
	return false, nil
}

// blame finds the point whose map can't be followed, since err says only where. One that is deleted is enough: all may
// be well then.
func (m *marker) blame(ctx context.Context, r *Repo, names []PointName, roots [][]rootRef, err error) (gone bool, _ error) {
	for _, n := range names {
		if r.isDeleted(ctx, r.pointObject(n)) {
			return true, unknownNeeds(n.String(), err)
		}
	}
	again := newMarker(m.r) // of all before the one, which can be followed: what they share is read once
	for i, n := range names {
		if err := again.roots(ctx, roots[i]); err != nil {
			return r.isDeleted(ctx, r.pointObject(n)), unknownNeeds(n.String(), err)
		}
	}
	return false, unknownNeeds("points", err) // what failed once did not fail again
}

// isPointless tells whether a session turns out to need nothing: it is deleted, or its
// point was published and then deleted, or its parent was deleted before the session could
// protect it. The writer of such a one is about to see that; it is given up, so that it
// cannot publish whatever it sees.
func (m *marker) isPointless(ctx context.Context, r *Repo, s *sessionState) bool {
	if s.isOpen() && s.begun.Parent != "" && r.isDeleted(ctx, s.begun.Parent) {
		if m.readOnly {
			m.pointless[s.name] = true
			return true
		}
		return r.giveUp(ctx, s) == nil
	}
	if s.done && s.end != nil && s.end.How == endCommit && r.isDeleted(ctx, s.end.Point) {
		m.pointless[s.name] = true
		return true
	}
	return r.isDeleted(ctx, s.name) && r.isDeleted(ctx, s.name+endSuffix)
}

// isDeleted tells whether an object is surely not there.
func (r *Repo) isDeleted(ctx context.Context, name string) bool {
	there, err := r.exists(ctx, name)
	return err == nil && !there
}

// allPoints lists the points of all VMs. An object that is no point but lies among
// them is an error: it may be one of a newer program.
func (r *Repo) allPoints(ctx context.Context) ([]PointName, error) {
	var names []PointName
	for info, err := range r.blobs.List(ctx, pointPrefix) {
		if err != nil {
			return nil, err
		}
		n, ok := r.parsePointName(info.Name)
		if !ok {
			return nil, fmt.Errorf("%w: %s is not the name of a point; move it away if it is none", ErrInvalid, info.Name)
		}
		names = append(names, n)
	}
	slices.SortFunc(names, func(a, b PointName) int { return cmp.Or(cmp.Compare(a.VM, b.VM), a.Time.Compare(b.Time)) })
	return names, nil
}
