package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/store/blob"
)

var errFinished = fmt.Errorf("%w: the backup is committed, aborted or broken already", ErrInvalid)

// Writer makes one new point of one VM. Nothing of it can be seen before Commit
// has put the point's document.
//
// Memory: the packs being filled and uploaded (at most 3 data packs of 32 MiB and 3
// node packs of 8 MiB), the session's deduplication (at most about 70 MiB), per
// disk what [DiskWriter] says. More than two Writers of one Repo share what two would
// use of packs and deduplication, down to 3 data packs of 1 MiB each.
type Writer struct {
	repo   *Repo
	vm     string
	parent *Point
	newest time.Time // of all points listed, readable or not
	broken []error

	writing     *writing // told to garbage collections
	under       *writing // another one on which it relies too; may be nil
	as          *Point   // publish this one, with other roots, as it is; may be nil
	lost        *marks   // records known to be unreadable; nil: none
	data, nodes *packWriter
	session     *session
	unlock      func() error
	locked      bool // by a lock: no other backup of the VM runs

	use sync.RWMutex // held shared by writes, exclusively by Commit and Abort

	mu       sync.Mutex
	ended    bool
	released bool
	disks    map[string]*DiskWriter
	full     *dedupIndex // built when a disk asks for it
}

// Begin starts a backup of vm and takes the VM's lock if the backend has locks;
// the error wraps ErrLocked if it is held. Where there are no locks (S3), Commit's error does if another
// backup of vm was committed since. The newest readable point becomes the
// parent. The caller ends the Writer with Commit or Abort.
func (r *Repo) Begin(ctx context.Context, vm string) (*Writer, error) {
	return r.beginAt(ctx, vm, (*Writer).findParent)
}

// beginAt is Begin with a parent that find puts into the Writer.
func (r *Repo) beginAt(ctx context.Context, vm string, find func(*Writer, context.Context) error) (_ *Writer, err error) {
	if err := ValidVM(vm); err != nil {
		return nil, err
	}
	// What is written from now on is sealed with the newest keys.
	if err := r.keys.refresh(ctx, r.blobs); err != nil {
		return nil, fmt.Errorf("backup of %s: %w", vm, err)
	}
	w := &Writer{
		repo: r, vm: vm, session: newSession(&r.share), disks: map[string]*DiskWriter{},
		unlock: func() error { return nil },
	}
	if l, ok := r.blobs.(blob.Locker); ok {
		if w.unlock, err = l.Lock(ctx, "vm-"+r.folder(vm)); err != nil {
			return nil, fmt.Errorf("backup of %s: %w", vm, err)
		}
		w.locked = true
	}
	// Asked for at once: it hangs on nothing else.
	var lost errgroup.Group
	lost.Go(func() (err error) {
		w.lost, err = r.lostRecords(ctx)
		return err
	})
	for w.writing == nil { // again, if the parent was deleted before it was protected
		w.parent, w.broken = nil, nil
		err := find(w, ctx)
		if err == nil {
			w.writing, err = r.beginSession(ctx, vm, w.parent)
		}
		if err != nil {
			_ = lost.Wait() // what came first is told
			return nil, errors.Join(fmt.Errorf("backup of %s: %w", vm, err), w.unlock())
		}
	}
	if err := lost.Wait(); err != nil {
		w.writing.abandon(ctx)
		return nil, errors.Join(fmt.Errorf("backup of %s: list what is damaged: %w", vm, err), w.unlock())
	}
	r.share.writers.Add(1)
	w.data = newPackWriter(r, kindData, r.dataPackLen)
	w.nodes = newPackWriter(r, kindNode, r.nodePackLen)
	return w, nil
}

// findParent takes the newest point whose document is whole. A damaged one must not
// stop all later backups.
func (w *Writer) findParent(ctx context.Context) error {
	names, err := w.repo.Points(ctx, w.vm)
	if err != nil || len(names) == 0 {
		return err
	}
	w.newest = names[len(names)-1].Time
	for i := len(names) - 1; i >= 0; i-- {
		p, err := w.repo.Point(ctx, names[i])
		switch {
		case err == nil:
			w.parent = p
			return nil
		case errors.Is(err, ErrNotFound): // deleted since it was listed
		case errors.Is(err, ErrCorrupt):
			w.broken = append(w.broken, err)
		default:
			return err
		}
	}
	return nil
}

// Parent returns the point that the new one continues, or nil. The caller must
// not change it.
func (w *Writer) Parent() *Point { return w.parent }

// Unreadable returns why points newer than Parent were passed over.
func (w *Writer) Unreadable() []error { return w.broken }

// begin keeps Commit and Abort out while a write runs.
func (w *Writer) begin() (end func(), err error) {
	w.use.RLock()
	if w.isEnded() {
		w.use.RUnlock()
		return nil, errFinished
	}
	return w.use.RUnlock, nil
}

func (w *Writer) isEnded() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ended
}

func (w *Writer) setEnded() (was bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	was, w.ended = w.ended, true
	return was
}

// Commit publishes the point and ends the Writer. It waits for running writes.
//
// p gives Time (now, if zero), Consistency, Quiesce, Config, Tool and for each disk
// of the Writer its Name, ChangeID, Tracking and Stats.Read; the rest is filled in. The
// point's time is moved after the newest point's if it is not later already. The result
// is the published point.
//
// Order: packs, the session's end, document. Maps are computed while the last data pack
// is put; the session's end is begun when all packs are durable, the document when that is. The error wraps ErrGivenUp if a garbage collection took the backup for
// dead. After an error nothing is published, the Writer is broken, and the
// caller must Abort it to release the lock.
func (w *Writer) Commit(ctx context.Context, p Point) (*Point, error) {
	w.use.Lock()
	defer w.use.Unlock()
	if w.setEnded() {
		return nil, errFinished
	}
	pub, err := w.commit(ctx, p)
	if err != nil {
		w.close()
		return nil, fmt.Errorf("commit of %s: %w", w.vm, w.writing.blame(ctx, err))
	}
	w.close()
	// The point is durable: that the lock does not go cleanly changes nothing.
	_ = w.release()
	return pub, nil
}

func (w *Writer) commit(ctx context.Context, p Point) (*Point, error) {
	if err := w.fillPoint(&p); err != nil {
		return nil, err
	}
	// Maps are computed while the last data pack is on its way.
	if err := w.data.send(ctx); err != nil {
		return nil, err
	}
	if err := w.buildMaps(ctx, p.Disks); err != nil {
		return nil, err
	}
	// Which of the last packs is durable first does not matter: what refers to them comes after both.
	if err := w.nodes.send(ctx); err != nil {
		return nil, err
	}
	if err := w.data.flush(ctx); err != nil {
		return nil, err
	}
	if err := w.nodes.flush(ctx); err != nil {
		return nil, err
	}
	if err := p.validate(); err != nil {
		return nil, err
	}
	doc, id, err := encodePoint(&p, w.repo.ids)
	if err != nil {
		return nil, err
	}
	p.ID = id
	if w.as == nil { // a copy may come before points that are there
		if err := w.rival(ctx); err != nil {
			return nil, err
		}
	}
	if err := w.writing.commit(ctx, &p); err != nil {
		return nil, err
	}
	// After its own end is there, which protects what it refers to from whoever ends the other now.
	if w.under != nil {
		if err := w.under.stillOpen(ctx); err != nil {
			return nil, err
		}
	}
	if err := w.repo.putDoc(ctx, w.repo.pointObject(p.Name()), doc); err != nil {
		return nil, err
	}
	w.writing.done(ctx)
	return &p, nil
}

// fillPoint fills all but roots and statistics.
func (w *Writer) fillPoint(p *Point) error {
	if w.as != nil {
		*p = *w.as
		p.Disks = append([]Disk(nil), p.Disks...)
		return nil
	}
	p.ID, p.VM, p.Parent = "", w.vm, ""
	if w.parent != nil {
		p.Parent = w.parent.ID
	}
	if p.Time.IsZero() {
		p.Time = time.Now()
	}
	p.Time = p.Time.UTC().Round(0) // without the monotonic clock
	if !p.Time.After(w.newest) {
		p.Time = w.newest.Add(1) // the clock went back; order must not
	}
	if p.Tool == "" {
		p.Tool = "tidemark"
	}
	p.Disks = append([]Disk(nil), p.Disks...) // the caller's stays as it is
	seen := map[string]bool{}
	for i := range p.Disks {
		d := &p.Disks[i]
		dw := w.disks[d.Name]
		if dw == nil || seen[d.Name] {
			return fmt.Errorf("%w: disk %q was not written, or is named twice", ErrInvalid, d.Name)
		}
		seen[d.Name] = true
		if d.Source == "" {
			d.Source = dw.opt.Source
		}
	}
	if len(seen) != len(w.disks) {
		return fmt.Errorf("%w: %d disks were written, the point has %d", ErrInvalid, len(w.disks), len(seen))
	}
	return nil
}

func (w *Writer) buildMaps(ctx context.Context, disks []Disk) error {
	roots, err := w.buildRoots(ctx)
	if err != nil {
		return err
	}
	for i := range disks {
		d := &disks[i]
		d.Root = roots[d.Name]
		if w.as != nil {
			continue
		}
		read := d.Stats.Read
		d.Stats = w.disks[d.Name].Stats()
		d.Stats.Read = read
	}
	return nil
}

// buildRoots adds the maps of all disks, as they are now, to node packs. No write may run.
func (w *Writer) buildRoots(ctx context.Context) (map[string]Root, error) {
	// Leaves that were sealed and then written again are read back.
	for _, d := range w.disks {
		if d.rewritten() {
			if err := w.nodes.flush(ctx); err != nil {
				return nil, err
			}
			break
		}
	}
	roots := map[string]Root{}
	for name, d := range w.disks {
		root, err := d.build(ctx)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", name, err)
		}
		roots[name] = root
	}
	return roots, nil
}

// Abort ends the Writer without a point: it waits for running writes, stops
// uploads and releases the lock. Packs that were put stay as garbage that no
// reader sees. Idempotent; it does nothing after a successful Commit.
func (w *Writer) Abort() error {
	// Let writes that wait for an upload fail, so that the lock is had soon.
	w.close()
	w.use.Lock()
	defer w.use.Unlock()
	w.setEnded()
	w.close() // once more: a write may have begun an upload meanwhile
	w.writing.abandon(context.Background())
	return w.release()
}

func (w *Writer) close() {
	w.data.close()
	w.nodes.close()
}

func (w *Writer) release() error {
	w.mu.Lock()
	unlock, first := w.unlock, !w.released
	w.unlock, w.released = func() error { return nil }, true
	w.mu.Unlock()
	if first {
		w.repo.share.writers.Add(-1)
	}
	return unlock()
}
