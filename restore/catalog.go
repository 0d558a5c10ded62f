package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/tidemark/tidemark/store"
)

// Catalog is a repository seen as disks. It is safe for concurrent use.
type Catalog struct {
	repo  *store.Repo
	cache *Cache
}

// PointInfo names a restore point: VM, ID and time.
type PointInfo = store.PointName

// DiskInfo describes a disk of a point.
type DiskInfo struct {
	Name   string `json:"name"`   // "disk0", ...
	Source string `json:"source"` // the device it was read from
	Size   int64  `json:"size"`   // bytes
	Grain  int    `json:"grain"`  // bytes; reads of whole aligned grains cost least
}

// PointDetails is what a point's document says. It must not be changed.
type PointDetails struct {
	PointInfo
	Consistency string
	Disks       []DiskInfo
	Config      []byte          // the VM's configuration, if the point has one
	Document    json.RawMessage // all of it, indented
	Damage      *store.Damage   // what is known to be lost of it; nil: nothing. Set by Find alone

	point *store.Point
}

// NewCatalog shows the points of repo, whose disks will share cache. The caller
// closes repo after all that was opened.
func NewCatalog(repo *store.Repo, cache *Cache) *Catalog {
	return &Catalog{repo: repo, cache: cache}
}

// ID names the repository for good.
func (c *Catalog) ID() string { return c.repo.ID() }

// VMs lists the machines that have points, ascending.
func (c *Catalog) VMs(ctx context.Context) ([]string, error) { return c.repo.VMs(ctx) }

// Points lists the points of a VM, ascending by time.
func (c *Catalog) Points(ctx context.Context, vm string) ([]PointInfo, error) {
	return c.repo.Points(ctx, vm)
}

// Point reads a point's document. The error wraps store.ErrNotFound if the
// point is gone.
func (c *Catalog) Point(ctx context.Context, p PointInfo) (*PointDetails, error) {
	point, err := c.repo.Point(ctx, p)
	if err != nil {
		return nil, err
	}
	return details(point)
}

// Whole leaves out of points, which are of one VM, those that are known to be damaged.
func (c *Catalog) Whole(ctx context.Context, vm string, points []PointInfo) ([]PointInfo, error) {
	known, err := c.repo.Damages(ctx, vm)
	if err != nil || len(known) == 0 {
		return points, err
	}
	return slices.DeleteFunc(slices.Clone(points), func(p PointInfo) bool { _, bad := known[p]; return bad }), nil
}

// Find reads the document of the point that ref names: "VM", "VM@latest",
// "VM@<start of an ID>" or "VM@<time>" (the newest at or before it). Only an ID leads to a point
// that is known to be damaged.
func (c *Catalog) Find(ctx context.Context, ref string) (*PointDetails, error) {
	point, damage, err := c.repo.FindWhole(ctx, ref)
	if err != nil {
		return nil, err
	}
	d, err := details(point)
	if err == nil {
		d.Damage = damage
	}
	return d, err
}

// ErrNotOffered is wrapped when a point is used only if it is named by its ID.
var ErrNotOffered = errors.New("choose another point, or name it by its ID")

// FindBootable is as Find, for a point to run a machine from. One that shows no single
// instant, or is known to be damaged, has to be named by its ID ([NamesByID]), else the
// error wraps [ErrNotOffered].
func (c *Catalog) FindBootable(ctx context.Context, ref string) (*PointDetails, error) {
	p, err := c.Find(ctx, ref)
	if err != nil {
		return nil, err
	}
	_, point, _ := strings.Cut(ref, "@")
	byID := NamesByID(point, p.ID)
	if p.Damage != nil && !byID {
		return nil, fmt.Errorf("%s is %s@%s, which is damaged: %w", ref, p.VM, p.ID, ErrNotOffered)
	}
	if p.Consistency == string(store.None) && !byID {
		return nil, fmt.Errorf("%s is %s@%s, which was read while it was written and shows no single instant: %w", ref, p.VM, p.ID, ErrNotOffered)
	}
	return p, nil
}

// NamesByID tells whether a point is named by its ID, or by the first 4 digits of it
// at least: such a name never leads to another point.
func NamesByID(point, id string) bool { return len(point) >= 4 && strings.HasPrefix(id, point) }

func details(p *store.Point) (*PointDetails, error) {
	doc, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("point %s of %s: %w", p.ID, p.VM, err)
	}
	d := &PointDetails{
		PointInfo:   p.Name(),
		Consistency: string(p.Consistency),
		Config:      p.Config,
		Document:    append(doc, '\n'),
		point:       p,
	}
	for _, disk := range p.Disks {
		d.Disks = append(d.Disks, DiskInfo{Name: disk.Name, Source: disk.Source, Size: disk.Root.Size, Grain: disk.Root.Grain})
	}
	return d, nil
}

// Open opens a disk of a point, to be closed after its last reader. It reads nothing yet.
func (c *Catalog) Open(ctx context.Context, p *PointDetails, disk int) (Disk, io.Closer, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	d, err := OpenPoint(c.repo, p.point, disk, c.cache)
	if err != nil {
		return nil, nil, err
	}
	return d, d, nil
}

// Identity names a disk of a point for good: what an [Overlay] over it is made for.
func (c *Catalog) Identity(p *PointDetails, disk int) string {
	return fmt.Sprintf("%s/%s/%s/%d", c.repo.ID(), p.VM, p.ID, disk)
}

// ErrNotFound is wrapped by errors of look-ups that found nothing. It is the
// same as store.ErrNotFound.
var ErrNotFound = store.ErrNotFound

// ErrAmbiguous is wrapped when the start of an ID fits several points. It is the same as
// store.ErrAmbiguous.
var ErrAmbiguous = store.ErrAmbiguous

// ErrInvalid is wrapped when a reference is none. It is the same as store.ErrInvalid.
var ErrInvalid = store.ErrInvalid
