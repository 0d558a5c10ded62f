package store

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A partial is a checkpoint of a backup that may never end: what of the disks is in the repository
// already. It is no point, and no reader of points sees it.
const (
	partialPrefix = "partial/"

	// PartialLife is how long a checkpoint lives. A backup is not taken up from it any more in the last
	// partialGrace: collections may have other clocks.
	PartialLife  = 8 * 24 * time.Hour
	partialGrace = 24 * time.Hour

	// maxCovered bounds the extents of one disk in a partial. What they don't hold is read again.
	maxCovered = 1 << 14
)

// Partial is what a backup of VM had stored when it was last known to be at work.
type Partial struct {
	VM      string        `json:"vm"`
	Time    time.Time     `json:"time"`
	Expires time.Time     `json:"expires"`
	Parent  string        `json:"parent,omitempty"` // ID of the point that it continues
	Disks   []PartialDisk `json:"disks"`

	object string
}

// PartialDisk is one disk of a Partial.
type PartialDisk struct {
	Name string `json:"name"`
	Root Root   `json:"root"` // the parent's content, and over it what was stored

	// Covered are the extents whose content was as in Root at ChangeID or later, ascending and apart, in
	// bytes: whole grains, but for the end of the disk. What changed after ChangeID must be read
	// again, and all of it if that is not known.
	Covered  []Covered `json:"covered"`
	ChangeID string    `json:"change_id,omitempty"`
	Tracking Tracking  `json:"tracking"` // so far
	Stats    Stats     `json:"stats"`    // so far; what changes once more is counted twice by who goes on from here
}

// Covered is an extent, in bytes.
type Covered struct {
	Off int64 `json:"off"`
	Len int64 `json:"len"`
}

// partialName returns the name of a new partial's object. It sorts by time, and is unique.
func (r *reader) partialName(vm string, t time.Time) string {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	return fmt.Sprintf("%s%s-%x", r.partialFolder(vm), t.UTC().Format(pointTime), id)
}

func (r *reader) partialFolder(vm string) string { return partialPrefix + r.folder(vm) + "/" }

// Checkpoint makes all that was written so far durable and says so, so that another Writer can go on from
// there if this one doesn't come to its end. Of each disk it needs Name, Covered, ChangeID, Tracking and
// Stats.Read; every disk of the Writer must be named. It waits for running writes and
// holds up others meanwhile. Nothing is published. Its cost is the map's upper nodes: some 40 KB per GiB covered.
func (w *Writer) Checkpoint(ctx context.Context, disks []PartialDisk) error {
	w.use.Lock()
	defer w.use.Unlock()
	if w.isEnded() {
		return errFinished
	}
	if err := w.checkpoint(ctx, disks); err != nil {
		return fmt.Errorf("checkpoint of %s: %w", w.vm, err)
	}
	return nil
}

func (w *Writer) checkpoint(ctx context.Context, disks []PartialDisk) error {
	now := time.Now().UTC()
	p := Partial{VM: w.vm, Time: now, Expires: now.Add(PartialLife), Disks: append([]PartialDisk(nil), disks...)}
	if w.parent != nil {
		p.Parent = w.parent.ID
	}
	for i := range p.Disks {
		p.Disks[i].Covered = p.Disks[i].Covered[:min(len(p.Disks[i].Covered), maxCovered)]
	}
	if err := w.data.flush(ctx); err != nil {
		return err
	}
	roots, err := w.buildRoots(ctx)
	if err != nil {
		return err
	}
	if err := w.nodes.flush(ctx); err != nil {
		return err
	}
	if len(disks) != len(roots) {
		return fmt.Errorf("%w: %d disks were written, %d are named", ErrInvalid, len(roots), len(disks))
	}
	for i := range p.Disks {
		d := &p.Disks[i]
		root, ok := roots[d.Name]
		if !ok {
			return fmt.Errorf("%w: disk %q was not written", ErrInvalid, d.Name)
		}
		read := d.Stats.Read
		d.Root, d.Stats = root, w.disks[d.Name].Stats()
		d.Stats.Read = read
	}
	if err := p.validate(); err != nil {
		return err
	}
	return w.repo.putDocument(ctx, w.repo.partialName(w.vm, now), "partial", p)
}

// Unfinished returns the newest checkpoint of a backup that continued the same point as w does, if it has
// not expired and all that it names is there; else nil, and why, if there is one that can't be
// used. [DiskOptions.Resume] takes its disks. It reads the whole map and the index of every pack in it.
func (w *Writer) Unfinished(ctx context.Context) (_ *Partial, why string, err error) {
	// After Begin: a collection lets whatever was begun before its verdict end first.
	p, err := w.repo.newestPartial(ctx, w.repo.partialFolder(w.vm))
	switch {
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion):
		return nil, err.Error(), nil // it must not stop all later backups
	case err != nil:
		return nil, "", err
	case p == nil || !p.continues(w.parent) || time.Until(p.Expires) < partialGrace:
		return nil, "", nil
	}
	// A grain that is lost would be in the point, unread.
	fresh, err := newReader(w.repo.blobs, w.repo.repo, w.repo.codec, w.repo.keys)
	if err != nil {
		return nil, "", err
	}
	v := &verifier{r: fresh, progress: func(int64, int64) {}, packs: map[PackID]struct{}{}}
	for i := range p.Disks {
		if err := v.disk(ctx, &Disk{Name: p.Disks[i].Name, Root: p.Disks[i].Root}); err != nil {
			return nil, "", err
		}
	}
	if n := len(v.report.Problems); n > 0 {
		return nil, fmt.Sprintf("%s: %d problems, such as %s: %s", p.object, n, v.report.Problems[0].Object, v.report.Problems[0].What), nil
	}
	// Nor may it lead to what a garbage collection is about to delete: nothing protects that but this
	// Writer's session, which a collection that began before does not wait for.
	for id := range v.packs {
		if _, ok := w.writing.condemned[id]; ok {
			return nil, fmt.Sprintf("%s: a garbage collection is at what it had stored", p.object), nil
		}
	}
	return p, "", nil
}

// partials lists the checkpoints of all VMs. Damaged ones are left out.
func (r *Repo) partials(ctx context.Context) ([]*Partial, error) {
	names, err := r.names(ctx, partialPrefix)
	if err != nil {
		return nil, err
	}
	var out []*Partial
	for _, name := range names {
		p := &Partial{object: name}
		err := r.document(ctx, name, "partial", p)
		switch {
		case err == nil && p.validate() == nil:
			out = append(out, p)
		case err == nil, errors.Is(err, ErrNotFound), errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion):
		default:
			return nil, err
		}
	}
	return out, nil
}

// roots are the maps of a checkpoint.
func (p *Partial) roots() (out []rootRef) {
	for i := range p.Disks {
		if root := p.Disks[i].Root; !root.Ref.IsZero() {
			out = append(out, rootRef{root.Ref, root.Level})
		}
	}
	return out
}

// continues tells whether p builds on parent, which is nil if the VM has no points.
func (p *Partial) continues(parent *Point) bool {
	if parent == nil {
		return p.Parent == ""
	}
	return p.Parent == parent.ID
}

// livePartials deletes the checkpoints from which no backup can be taken up any more (expired, damaged, not the newest
// of its VM, or of another parent than the VM's newest point) and returns the others. Whoever has taken one up needs its
// object no longer: its session protects what was not condemned before.
func (r *Repo) livePartials(ctx context.Context, now time.Time) (live []*Partial, err error) {
	folders, err := r.blobs.ListDirs(ctx, partialPrefix)
	if err != nil {
		return nil, err
	}
	for _, folder := range folders {
		folder = partialPrefix + folder + "/"
		p, err := r.newestPartial(ctx, folder)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			return nil, err
		}
		if p != nil {
			newest, err := r.newestPoint(ctx, p.VM)
			if err != nil {
				return nil, err
			}
			if now.After(p.Expires) || !p.continues(newest) {
				p = nil
			}
		}
		names, err := r.names(ctx, folder)
		if err != nil {
			return nil, err
		}
		// What comes after p came meanwhile.
		if err := r.removed(ctx, slices.DeleteFunc(names, func(name string) bool { return p != nil && name >= p.object })...); err != nil {
			return nil, err
		}
		if p != nil {
			live = append(live, p)
		}
	}
	return live, nil
}

// newestPoint returns the newest point that can be read, or nil.
func (r *Repo) newestPoint(ctx context.Context, vm string) (*Point, error) {
	w := Writer{repo: r, vm: vm}
	err := w.findParent(ctx)
	return w.parent, err
}

// newestPartial returns nil if there is none in the folder.
func (r *Repo) newestPartial(ctx context.Context, folder string) (*Partial, error) {
	names, err := r.names(ctx, folder)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	last := names[len(names)-1]
	p := &Partial{object: last}
	if err := r.document(ctx, last, "partial", p); err != nil {
		if errors.Is(err, ErrNotFound) { // deleted since it was listed
			return nil, nil
		}
		return nil, err
	}
	if r.partialFolder(p.VM) != folder || !strings.HasPrefix(last, folder+p.Time.UTC().Format(pointTime)+"-") {
		return nil, &CorruptError{last, "it is another one"}
	}
	if err := p.validate(); err != nil {
		return nil, &CorruptError{last, err.Error()}
	}
	return p, nil
}

func (p *Partial) validate() error {
	if err := ValidVM(p.VM); err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, d := range p.Disks {
		if err := errors.Join(validDiskName(d.Name), d.Root.validate()); err != nil {
			return err
		}
		if seen[d.Name] {
			return fmt.Errorf("%w: two disks named %q", ErrInvalid, d.Name)
		}
		seen[d.Name] = true
		grain := int64(d.Root.Grain)
		if len(d.Covered) > maxCovered {
			return fmt.Errorf("%w: %d extents", ErrInvalid, len(d.Covered))
		}
		at := int64(-1)
		for _, c := range d.Covered {
			if c.Off <= at || c.Off%grain != 0 || c.Len <= 0 || c.Len > d.Root.Size-c.Off || c.Len%grain != 0 && c.Off+c.Len != d.Root.Size {
				return fmt.Errorf("%w: extent [%d, %d) of disk %s", ErrInvalid, c.Off, c.Off+c.Len, d.Name)
			}
			at = c.Off + c.Len
		}
		if !json.Valid(d.Tracking.Evidence) && len(d.Tracking.Evidence) > 0 {
			return fmt.Errorf("%w: evidence of disk %s", ErrInvalid, d.Name)
		}
	}
	return nil
}

// Disk returns the disk of that name, or nil.
func (p *Partial) Disk(name string) *PartialDisk {
	if p == nil {
		return nil
	}
	for i := range p.Disks {
		if p.Disks[i].Name == name {
			return &p.Disks[i]
		}
	}
	return nil
}
