package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"runtime"
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

// marker marks all that roots lead to. A node that is marked has been walked, so
// that subtrees which points share are read once.
type marker struct {
	*marks
	r    *reader
	seen map[string]struct{} // points that were marked, by object
	// Sessions found to need nothing, see isPointless.
	pointless map[string]bool
	readOnly  bool
	nodes     func(n int64) // told how many nodes were read; may be nil

	mu   sync.Mutex
	read int64
}

func newMarker(r *reader) *marker {
	return &marker{marks: newMarks(), r: r, seen: map[string]struct{}{}, pointless: map[string]bool{}}
}

// roots marks all that is below roots. Any damage on the way is an error: it is not known what lies
// below it.
func (m *marker) roots(ctx context.Context, roots []rootRef) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	for _, root := range roots {
		if err := m.node(ctx, g, root.Ref, int(root.Level)); err != nil {
			g.Go(func() error { return err }) // not in the way of what cancelled it
			break
		}
	}
	return g.Wait()
}

func (m *marker) node(ctx context.Context, g *errgroup.Group, ref Ref, level int) error {
	if ref.IsZero() || !m.add(ref) {
		return ctx.Err()
	}
	// Not through the cache of nodes: each is read once.
	n, err := m.r.loadNode(ctx, ref)
	if err == nil && int(n.level) != level {
		err = recordError(ref, fmt.Sprintf("a map node of level %d, not %d", n.level, level))
	}
	if err != nil {
		return err
	}
	m.count()
	if level == 0 {
		m.add(n.refs...)
		return ctx.Err()
	}
	for _, c := range n.refs {
		down := func() error { return m.node(ctx, g, c, level-1) }
		if g.TryGo(down) {
			continue
		}
		if err := down(); err != nil {
			return err
		}
	}
	return nil
}

func (m *marker) count() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.read++
	if m.nodes != nil {
		m.nodes(m.read)
	}
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
		m.marks, m.seen = newMarks(), map[string]struct{}{}
	}
}

// liveOnce tells, with an error, whether what could not be walked is gone.
func (m *marker) liveOnce(ctx context.Context, r *Repo) (_ []*sessionState, gone bool, _ error) {
	unknown := func(what string, err error) error {
		return fmt.Errorf("%s: what it needs can't be told, so nothing is deleted: %w", what, err)
	}
	names, err := r.allPoints(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, n := range names {
		if _, ok := m.seen[r.pointObject(n)]; ok {
			continue
		}
		p, err := r.Point(ctx, n)
		if errors.Is(err, ErrNotFound) {
			continue // deleted since
		}
		if err == nil {
			err = m.roots(ctx, rootRefs(p))
		}
		if err != nil {
			return nil, r.isDeleted(ctx, r.pointObject(n)), unknown(n.String(), err)
		}
		m.seen[r.pointObject(n)] = struct{}{}
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
			return nil, ctx.Err() == nil, unknown(p.object, err)
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
			return nil, m.isPointless(ctx, r, s), unknown(s.name, err)
		}
	}
	return sessions, false, nil
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
