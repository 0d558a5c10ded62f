package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/restore"
)

const (
	// maxListed is how many exports, and how many states of a disk, are listed.
	// What is not listed can be opened all the same.
	maxListed = 1000
	// readersOfList is how many documents are read at once for a list.
	readersOfList = 16
)

// Points shows the disks of a repository's restore points as read-only exports:
//
//	VM@POINT/DISK
//
// POINT is as in [restore.Catalog.FindBootable]; without one it is the latest.
// The disk may be left out if the point has only one. Disks are opened when a client
// enters them, are shared by all who do, and are closed when the last has left.
// Points that are made or forgotten meanwhile are seen at once.
type Points struct {
	catalog *restore.Catalog
	vms     []string // nil: all
	limit   int      // of a list

	mu    sync.Mutex
	open  map[string]*openDisk             // by the name with the whole ID
	disks map[restore.PointInfo]listedDisk // what was listed last
}

var _ Exports = (*Points)(nil)

// openDisk is a disk that somebody uses.
type openDisk struct {
	disk   restore.Disk
	closer io.Closer
	users  int
}

// listedDisk is what a listing needs of a point's document.
type listedDisk struct {
	names []string
	about string
}

// NewPoints makes exports of the points of these VMs; of all, those still to come too,
// if none is named.
func NewPoints(catalog *restore.Catalog, vms ...string) *Points {
	return &Points{catalog: catalog, vms: vms, limit: maxListed, open: map[string]*openDisk{}}
}

// Open implements [Exports]. A point that is offered by its ID only is unknown under
// its other names.
func (s *Points) Open(ctx context.Context, _ Client, name string) (Export, error) {
	ref, diskName, _ := strings.Cut(name, "/")
	vm, point, _ := strings.Cut(ref, "@")
	if len(s.vms) > 0 && !slices.Contains(s.vms, vm) {
		return Export{}, fmt.Errorf("%w %q", ErrUnknownExport, name)
	}
	p, err := s.catalog.FindBootable(ctx, ref)
	if isNothing(err) || errors.Is(err, restore.ErrNotOffered) {
		return Export{}, fmt.Errorf("%w %q: %w", ErrUnknownExport, name, err)
	}
	if err != nil {
		return Export{}, err
	}
	i := slices.IndexFunc(p.Disks, func(d restore.DiskInfo) bool { return d.Name == diskName })
	if diskName == "" && len(p.Disks) == 1 {
		i = 0
	}
	if i < 0 {
		return Export{}, fmt.Errorf("%w %q: %s@%s has %d disks", ErrUnknownExport, name, p.VM, p.ID, len(p.Disks))
	}
	e := Export{
		Name:        p.VM + "@" + p.ID + "/" + p.Disks[i].Name,
		Description: about(p),
		ReadOnly:    true,
		Moving:      !restore.NamesByID(point, p.ID),
		History:     NewHistory(s.catalog, p, p.Disks[i].Name),
	}
	e.Disk, e.Release, err = s.use(ctx, e.Name, p, i)
	return e, err
}

// use opens a disk, or takes the one that is open.
func (s *Points) use(ctx context.Context, name string, p *restore.PointDetails, i int) (restore.Disk, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.open[name]
	if o == nil {
		d, closer, err := s.catalog.Open(ctx, p, i) // reads nothing
		if err != nil {
			return nil, nil, err
		}
		o = &openDisk{disk: d, closer: closer}
		s.open[name] = o
	}
	o.users++
	return o.disk, func() { s.leave(name, o) }, nil
}

func (s *Points) leave(name string, o *openDisk) {
	s.mu.Lock()
	o.users--
	last := o.users == 0
	if last {
		delete(s.open, name)
	}
	s.mu.Unlock()
	if last {
		_ = o.closer.Close() // it was only read
	}
}

// List implements [Exports]: the latest point of each VM under that name, and the
// newest ones by their IDs, 1000 exports in all, of every VM its share.
func (s *Points) List(ctx context.Context, _ Client) ([]Listing, error) {
	vms := s.vms
	if len(vms) == 0 {
		var err error
		if vms, err = s.catalog.VMs(ctx); err != nil {
			return nil, err
		}
	}
	var list []Listing
	seen := map[restore.PointInfo]listedDisk{}
	for i, vm := range vms {
		share := (s.limit - len(list)) / (len(vms) - i)
		of, err := s.listVM(ctx, vm, share, seen)
		if err != nil {
			return nil, err
		}
		list = append(list, of...)
	}
	s.mu.Lock()
	s.disks = seen
	s.mu.Unlock()
	return list, nil
}

// listVM lists at most limit exports of a VM and notes in seen what it has read.
func (s *Points) listVM(ctx context.Context, vm string, limit int, seen map[restore.PointInfo]listedDisk) ([]Listing, error) {
	points, err := s.catalog.Points(ctx, vm)
	if err == nil {
		points, err = s.catalog.Whole(ctx, vm, points)
	}
	if err != nil || len(points) == 0 || limit == 0 {
		return nil, err
	}
	var list []Listing
	latest, err := s.catalog.FindBootable(ctx, vm)
	switch {
	case err == nil:
		for _, d := range latest.Disks {
			list = append(list, Listing{Name: vm + "@latest/" + d.Name, Description: about(latest)})
		}
	case !isNothing(err) && !errors.Is(err, restore.ErrNotOffered):
		return nil, err
	}
	points = points[max(0, len(points)-limit):]
	slices.Reverse(points)
	disks, err := s.documents(ctx, points)
	if err != nil {
		return nil, err
	}
	for i, d := range disks {
		if d.names == nil {
			continue // gone, or damaged
		}
		seen[points[i]] = d
		for _, name := range d.names {
			list = append(list, Listing{Name: vm + "@" + points[i].ID + "/" + name, Description: d.about})
		}
	}
	return list[:min(limit, len(list))], nil
}

// documents reads what listings need of the points' documents, unless it is known.
func (s *Points) documents(ctx context.Context, points []restore.PointInfo) ([]listedDisk, error) {
	s.mu.Lock()
	known := s.disks // never changed, only replaced
	s.mu.Unlock()
	disks := make([]listedDisk, len(points))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(readersOfList)
	for i, point := range points {
		if d, ok := known[point]; ok {
			disks[i] = d
			continue
		}
		g.Go(func() error {
			p, err := s.catalog.Point(ctx, point)
			if errors.Is(err, restore.ErrNotFound) || errors.Is(err, restore.ErrCorrupt) {
				return nil
			}
			if err != nil {
				return err
			}
			disks[i].about = about(p)
			for _, d := range p.Disks {
				disks[i].names = append(disks[i].names, d.Name)
			}
			return nil
		})
	}
	return disks, g.Wait()
}

// about describes a point to people.
func about(p *restore.PointDetails) string {
	return p.Time.UTC().Format("2006-01-02T15:04:05Z") + ", consistency " + p.Consistency
}

// isNothing tells whether an error says that a reference leads to no point.
func isNothing(err error) bool {
	return errors.Is(err, restore.ErrNotFound) || errors.Is(err, restore.ErrAmbiguous) || errors.Is(err, restore.ErrInvalid)
}

// history is the other points of a VM, as states of one disk.
type history struct {
	catalog *restore.Catalog
	point   restore.PointInfo
	disk    string
}

// NewHistory makes the points of p's VM the states of its disk of this name: listed are
// the older ones, newest first, by their IDs; other points, also newer ones, can be opened
// by any of their names.
func NewHistory(catalog *restore.Catalog, p *restore.PointDetails, disk string) History {
	return history{catalog: catalog, point: p.PointInfo, disk: disk}
}

// List implements [History].
func (h history) List(ctx context.Context) ([]string, error) {
	points, err := h.catalog.Points(ctx, h.point.VM)
	if err == nil {
		points, err = h.catalog.Whole(ctx, h.point.VM, points)
	}
	var ids []string
	for _, p := range slices.Backward(points) {
		if p.ID != h.point.ID && !p.Time.After(h.point.Time) && len(ids) < maxListed {
			ids = append(ids, p.ID)
		}
	}
	return ids, err
}

// Open implements [History].
func (h history) Open(ctx context.Context, name string) (restore.Disk, func(), error) {
	p, err := h.catalog.Find(ctx, h.point.VM+"@"+name)
	if isNothing(err) {
		return nil, nil, fmt.Errorf("%w: %w", ErrUnknownPast, err)
	}
	if err != nil {
		return nil, nil, err
	}
	for i, d := range p.Disks {
		if d.Name != h.disk {
			continue
		}
		disk, closer, err := h.catalog.Open(ctx, p, i)
		if err != nil {
			return nil, nil, err
		}
		return disk, func() { _ = closer.Close() }, nil // it was only read
	}
	return nil, nil, fmt.Errorf("%w: %s@%s has no %s", ErrUnknownPast, p.VM, p.ID, h.disk)
}
