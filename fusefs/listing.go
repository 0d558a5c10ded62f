package fusefs

import (
	"slices"
	"sync"
	"time"

	"github.com/tidemark/tidemark/restore"
)

// listing is the points of a VM with their names, ascending by time. It does not change.
type listing struct {
	points []namedPoint
	byName map[string]int // index in points
	latest int            // index of the newest that is not known to be damaged; -1: there is none
}

// newListing makes a listing of points, of which whole are not known to be damaged.
func newListing(points, whole []restore.PointInfo) listing {
	l := listing{points: namePoints(points), byName: make(map[string]int, len(points)), latest: -1}
	for i, p := range l.points {
		l.byName[p.name] = i
	}
	if n := len(whole); n > 0 {
		l.latest = slices.Index(points, whole[n-1])
	}
	return l
}

type namedPoint struct {
	name string
	restore.PointInfo
}

// nameTime is the layout of a point's name: no colons, for the tools that
// take them for hosts or drives.
const nameTime = "2006-01-02T15-04-05Z"

// shortID is how much of an ID tells two points of one second apart, in most cases.
const shortID = 8

// namePoints gives each point a name of its own.
func namePoints(points []restore.PointInfo) []namedPoint {
	base := func(p restore.PointInfo) string { return p.Time.UTC().Format(nameTime) }
	perSecond, perName := map[string]int{}, map[string]int{}
	short := func(p restore.PointInfo) string { return base(p) + "-" + p.ID[:min(shortID, len(p.ID))] }
	for _, p := range points {
		perSecond[base(p)]++
		perName[short(p)]++
	}
	named := make([]namedPoint, 0, len(points))
	for _, p := range points {
		name := base(p)
		switch {
		case perSecond[name] == 1:
		case perName[short(p)] == 1:
			name = short(p)
		default:
			name += "-" + p.ID
		}
		named = append(named, namedPoint{name: name, PointInfo: p})
	}
	return named
}

// find returns the point of a name.
func (l listing) find(name string) (namedPoint, bool) {
	i, ok := l.byName[name]
	if !ok {
		return namedPoint{}, false
	}
	return l.points[i], true
}

// newest returns the point that "latest" leads to.
func (l listing) newest() (namedPoint, bool) {
	if l.latest < 0 {
		return namedPoint{}, false
	}
	return l.points[l.latest], true
}

// before returns the point of the same VM before p, damaged or not.
func (l listing) before(p restore.PointInfo) (namedPoint, bool) {
	i := slices.IndexFunc(l.points, func(q namedPoint) bool { return q.PointInfo == p })
	if i < 1 {
		return namedPoint{}, false
	}
	return l.points[i-1], true
}

// polled is what is read again when somebody asks for it and it has become old. An error is kept as
// long: a repository that does not answer is not asked by every process that looks.
type polled[T any] struct {
	mu    sync.Mutex // while it is read too: who comes meanwhile takes the same answer
	value T
	err   error
	until time.Time
}

// pollShare bounds what part of the time is spent on reading again what takes long to read.
const pollShare = 10

func (p *polled[T]) get(refresh time.Duration, read func(old T) (T, error)) (T, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	began := time.Now()
	if began.Before(p.until) {
		return p.value, p.err
	}
	value, err := read(p.value)
	if p.err = err; err == nil {
		p.value = value
	}
	p.until = began.Add(max(refresh, pollShare*time.Since(began)))
	return p.value, p.err
}

// vmNames lists the VMs, as they were at most t.refresh ago.
func (t *tree) vmNames() ([]string, error) {
	return t.vms.get(t.refresh, func(old []string) ([]string, error) {
		vms, err := t.catalog.VMs(t.ctx)
		if err != nil {
			return nil, err
		}
		for _, vm := range old {
			if !slices.Contains(vms, vm) {
				t.gone.tell([]string{vm})
			}
		}
		return vms, nil
	})
}

// list returns the points of a VM, as they were at most t.refresh ago, or longer if it takes long to
// list them.
func (t *tree) list(vm string) (listing, error) {
	t.mu.Lock()
	p := t.listings[vm]
	if p == nil {
		p = &polled[listing]{}
		t.listings[vm] = p
	}
	t.mu.Unlock()
	return p.get(t.refresh, func(old listing) (listing, error) {
		points, err := t.catalog.Points(t.ctx, vm)
		if err != nil {
			return listing{}, err
		}
		whole, err := t.catalog.Whole(t.ctx, vm, points)
		if err != nil {
			return listing{}, err
		}
		l := newListing(points, whole)
		for _, p := range old.points {
			if now, ok := l.find(p.name); !ok || now.ID != p.ID {
				t.gone.tell([]string{vm, p.name})
			}
		}
		return l, nil
	})
}
