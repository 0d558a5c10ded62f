package fusefs

import (
	"slices"
	"time"

	"github.com/tidemark/tidemark/restore"
)

// listing is the points of a VM with their names, ascending.
type listing struct {
	at     time.Time // when it was read
	points []namedPoint
	latest string // ID of the newest point that is not known to be damaged; empty: there is none
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
	i := slices.IndexFunc(l.points, func(p namedPoint) bool { return p.name == name })
	if i < 0 {
		return namedPoint{}, false
	}
	return l.points[i], true
}

// newest returns the point that "latest" leads to.
func (l listing) newest() (namedPoint, bool) {
	i := slices.IndexFunc(l.points, func(p namedPoint) bool { return p.ID == l.latest })
	if i < 0 {
		return namedPoint{}, false
	}
	return l.points[i], true
}

// vmNames lists the VMs, as they were at most t.refresh ago.
func (t *tree) vmNames() ([]string, error) {
	t.mu.Lock()
	vms, at := t.vms, t.vmsAt
	t.mu.Unlock()
	if time.Since(at) < t.refresh {
		return vms, nil
	}
	at = time.Now()
	vms, err := t.catalog.VMs(t.ctx)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.vms, t.vmsAt = vms, at
	return vms, nil
}

// list returns the points of a VM, as they were at most t.refresh ago.
func (t *tree) list(vm string) (listing, error) {
	t.mu.Lock()
	l, ok := t.listings[vm]
	t.mu.Unlock()
	if ok && time.Since(l.at) < t.refresh {
		return l, nil
	}
	at := time.Now()
	points, err := t.catalog.Points(t.ctx, vm)
	if err != nil {
		return listing{}, err
	}
	whole, err := t.catalog.Whole(t.ctx, vm, points)
	if err != nil {
		return listing{}, err
	}
	l = listing{at: at, points: namePoints(points)}
	if n := len(whole); n > 0 {
		l.latest = whole[n-1].ID
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(points) == 0 {
		delete(t.listings, vm) // any name may be asked for
	} else {
		t.listings[vm] = l
	}
	return l, nil
}
