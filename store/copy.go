package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
)

// CopyReport says what a copy did.
type CopyReport struct {
	Points  []PointName `json:"points"`  // made, as they are named in the destination
	Present int         `json:"present"` // that the destination had already
	Grains  int64       `json:"grains"`  // that differ from the point before, and were looked for
	Sent    int64       `json:"sent"`    // of these, grains that the destination did not have
	Stored  int64       `json:"stored"`  // bytes written to its packs
}

// Copy copies points to another repository, oldest first: their disks, times, consistency, configuration.
// Only grains that the destination does not hold are read here, checked, and written there as
// they are compressed. (Where the two name content by other keys, all that differ from the
// point before must be read to know.) A point that is there already is passed over, and
// an interrupted copy is taken up where it stopped by calling Copy again. The
// parent of a copy is the copy of the parent, if that is there.
//
// The error wraps ErrExists if the destination has another point of that VM and time, ErrLocked if a
// backup of that VM runs there, ErrCorrupt if a point can't be read here in whole: it is not
// copied, and those after it are not tried.
//
// progress may be nil; it is called from one goroutine at a time with the bytes of
// the disks' extents dealt with, of all points. Memory: the deduplication index of the destination, 16 bytes
// per grain there, and a [Writer].
func (r *Repo) Copy(ctx context.Context, to *Repo, names []PointName, progress func(point PointName, done, total int64)) (CopyReport, error) {
	if progress == nil {
		progress = func(PointName, int64, int64) {}
	}
	names = slices.Clone(names)
	slices.SortFunc(names, func(a, b PointName) int { return a.Time.Compare(b.Time) })
	c := &copying{from: r, to: to, progress: progress}
	if r.ID() == to.ID() {
		return c.report, fmt.Errorf("%w: copy within one repository", ErrInvalid)
	}
	defer func() {
		if c.session != nil {
			c.session.abandon(ctx)
		}
	}()
	for _, n := range names {
		if err := c.point(ctx, n); err != nil {
			return c.report, fmt.Errorf("copy %s: %w", n, err)
		}
	}
	return c.report, nil
}

type copying struct {
	from, to *Repo
	progress func(PointName, int64, int64)

	mu     sync.Mutex // guards the counts of report
	report CopyReport

	// What the destination holds and what was sent is remembered from point to point, within a session that lasts
	// as long as the copy: neither can go before that ends. Each point has a session of its own
	// too, which protects its parent.
	session *writing
	index   *dedupIndex
	grains  *session
}

func (c *copying) begin(ctx context.Context, vm string) error {
	if c.session != nil {
		return nil
	}
	s, err := c.to.beginSession(ctx, vm, nil)
	if err != nil {
		return err
	}
	c.session = s
	lost, err := c.to.lostRecords(ctx)
	if err != nil {
		return err
	}
	c.index, err = newDedupIndex(ctx, c.to.reader, s.condemned, lost)
	return err
}

// copyOf finds the copy of a point, or what it is a copy of.
func (c *copying) copyOf(ctx context.Context, p *Point) (*Point, error) {
	n := p.Name()
	names, err := c.to.Points(ctx, n.VM)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(names, func(x PointName) bool { return x.Time.Equal(n.Time) })
	if i < 0 {
		return nil, nil
	}
	there, err := c.to.Point(ctx, names[i])
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if there.isFrom(c.from, p.ID) || p.isFrom(c.to, there.ID) {
		return there, nil
	}
	return nil, fmt.Errorf("the destination has another point of that time, %s: %w", there.Name(), ErrExists)
}

func (c *copying) point(ctx context.Context, n PointName) error {
	p, err := c.from.Point(ctx, n)
	if err != nil {
		return err
	}
	there, err := c.copyOf(ctx, p)
	if err != nil {
		return err
	}
	if there != nil {
		c.report.Present++
		return nil
	}
	if err := c.begin(ctx, n.VM); err != nil {
		return err
	}
	var base *Point // here, of which the destination has a copy
	w, err := c.to.beginAt(ctx, n.VM, func(w *Writer, ctx context.Context) error {
		base, w.parent, err = c.nearest(ctx, p)
		return err
	})
	if err != nil {
		return err
	}
	defer func() { _ = w.Abort() }()
	w.under, w.full = c.session, c.index
	if c.grains == nil {
		c.grains = w.session
	}
	w.session = c.grains

	pub := *p
	pub.Parent = ""
	if p.Parent != "" && w.parent != nil && (w.parent.isFrom(c.from, p.Parent) || base.isFrom(c.to, w.parent.ID) && base.ID == p.Parent) {
		pub.Parent = w.parent.ID
	}
	pub.Origin = &Origin{Repository: c.from.ID(), Point: p.ID}
	w.as = &pub

	for i := range p.Disks {
		if err := c.disk(ctx, w, &p.Disks[i], base); err != nil {
			return fmt.Errorf("disk %s: %w", p.Disks[i].Name, err)
		}
	}
	made, err := w.Commit(ctx, Point{})
	if err != nil {
		return err
	}
	for _, d := range w.disks {
		c.report.Stored += d.Stats().Stored
	}
	c.report.Points = append(c.report.Points, made.Name())
	return nil
}

// nearest returns the newest point before p that both have, as it is here and there.
func (c *copying) nearest(ctx context.Context, p *Point) (here, there *Point, err error) {
	ours, err := c.from.Points(ctx, p.VM)
	if err != nil {
		return nil, nil, err
	}
	theirs, err := c.to.Points(ctx, p.VM)
	if err != nil {
		return nil, nil, err
	}
	for _, n := range slices.Backward(theirs) {
		i := slices.IndexFunc(ours, func(o PointName) bool { return o.Time.Equal(n.Time) })
		if i < 0 || !n.Time.Before(p.Time) {
			continue
		}
		there, err := c.to.Point(ctx, n)
		var here *Point
		if err == nil {
			here, err = c.from.Point(ctx, ours[i])
		}
		switch {
		case err == nil && (there.isFrom(c.from, here.ID) || here.isFrom(c.to, there.ID)):
			return here, there, nil
		case err == nil:
		case !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrCorrupt):
			return nil, nil, err
		}
	}
	return nil, nil, nil
}

// isFrom tells whether p was made from a point of r.
func (p *Point) isFrom(r *Repo, id string) bool {
	return p.Origin != nil && p.Origin.Repository == r.ID() && p.Origin.Point == id
}

func (c *copying) disk(ctx context.Context, w *Writer, d *Disk, base *Point) error {
	out, err := w.Disk(ctx, DiskOptions{Name: d.Name, Source: d.Source, Size: d.Root.Size, Grain: d.Root.Grain, Dedup: true})
	if err != nil {
		return err
	}
	m, err := c.from.Map(d.Root)
	if err != nil {
		return err
	}
	// The destination's parent has what base has; a disk that was cut is told apart by the Writer.
	old := Root{Size: d.Root.Size, Grain: d.Root.Grain, Level: d.Root.Level}
	if base != nil && out.HasParent() {
		for _, b := range base.Disks {
			if b.Name == d.Name {
				old = b.Root
			}
		}
	}
	was, err := c.from.Map(old)
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	for run, err := range m.Diff(gctx, was, 0, m.Grains()) {
		if err != nil {
			g.Go(func() error { return err }) // not in the way of what cancelled it
			break
		}
		c.progress(w.as.Name(), run.To*int64(d.Root.Grain), d.Root.Size)
		for n := run.From; n < run.To && gctx.Err() == nil; n++ {
			g.Go(func() error { return c.grain(gctx, out, m, n) })
		}
	}
	return g.Wait()
}

func (c *copying) grain(ctx context.Context, out *DiskWriter, m *Map, n int64) error {
	ref, err := m.Lookup(ctx, n)
	if err != nil {
		return err
	}
	now := Ref{}
	sent := false
	if !ref.IsZero() {
		h := ref.Hash
		get := sync.OnceValues(func() (record, error) { return c.from.wholeRecord(ctx, ref, out.shape.Grain) })
		if !bytes.Equal(c.from.ids.key, c.to.ids.key) { // the same content has another name there
			rec, err := get()
			if err != nil {
				return err
			}
			h = c.to.ids.sum(rec.content)
		}
		now, err = out.place(ctx, h, func() (Ref, int64, error) {
			sent = true
			rec, err := get()
			if err != nil {
				return Ref{}, 0, err
			}
			return out.w.data.add(ctx, rec.packed, len(rec.content), rec.how, h)
		})
		if err != nil {
			return err
		}
	}
	c.mu.Lock()
	c.report.Grains++
	if sent {
		c.report.Sent++
	}
	c.mu.Unlock()
	return out.set(ctx, n, now, true)
}

// record is a grain as it is and as it was compressed.
type record struct {
	content, packed []byte
	how             byte // codec, without the seal
}

// wholeRecord reads a grain, checked against ref, and its compressed form.
func (r *reader) wholeRecord(ctx context.Context, ref Ref, grain int) (rec record, err error) {
	err = r.following(ctx, ref.Pack, func(x *packIndex) error {
		e, err := x.locateGrain(ref, grain)
		if err != nil {
			return err
		}
		stored := make([]byte, e.stored)
		if err := r.readFull(ctx, packObject(ref.Pack, x.generation), stored, int64(e.off)); err != nil {
			return err
		}
		rec = record{content: make([]byte, grain), packed: stored, how: e.codec & codecCompression}
		if err := r.decode(x, ref, e, stored, rec.content); err != nil {
			return err
		}
		if x.seal != nil {
			rec.packed, err = x.unseal(make([]byte, 0, len(stored)), stored, ref.Ord, &e)
		}
		return err
	})
	return rec, err
}
