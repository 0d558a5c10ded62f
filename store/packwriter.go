package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"sync"
)

// maxUploads is how many full packs may be on their way at once. Memory: one
// pack being filled and these.
const maxUploads = 2

// maxFill bounds the records of a pack that is written, so that its index
// (52 bytes each) stays cheap to fetch for one grain.
const maxFill = 1 << 14

// packSlack is room for the record that fills a large pack up, and for its index, in bytes. A
// pack that needs more grows.
const packSlack = 2 << 20

// locker is a mutex whose waiters can be cancelled.
type locker chan struct{}

func newLocker() locker { return make(locker, 1) }

func (l locker) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	default:
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l locker) unlock() { <-l }

// packWriter fills packs of one kind and puts them. Safe for concurrent use.
// After the first failure of a Put it is broken for good.
type packWriter struct {
	repo   *Repo
	kind   packKind
	target int // bytes, while few Writers are at work

	life   context.Context // of uploads: they outlive the call that began them
	cancel context.CancelFunc
	slots  chan struct{} // one per upload on its way

	fill locker // guards cur
	cur  *packBuilder

	mu   sync.Mutex
	err  error    // the first failure, sticky
	bufs [][]byte // of packs that were put, to be filled again
}

func newPackWriter(r *Repo, kind packKind, target int) *packWriter {
	life, cancel := context.WithCancel(context.Background())
	return &packWriter{
		repo: r, kind: kind, target: target, life: life, cancel: cancel,
		slots: make(chan struct{}, maxUploads), fill: newLocker(),
	}
}

func (w *packWriter) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *packWriter) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}

// goal is how long a pack is made, in bytes.
func (w *packWriter) goal() int { return w.repo.share.part(w.target, leastPack) }

func (w *packWriter) full() bool {
	return len(w.cur.buf) >= w.goal() || w.cur.count() >= maxFill
}

// add appends a record and returns its place and what it costs in the repository,
// in bytes. It waits for an upload when too many are on their way.
// That it returned does not mean that the record is durable: flush does.
func (w *packWriter) add(ctx context.Context, stored []byte, raw int, how byte, h Hash) (Ref, int64, error) {
	if err := w.fill.lock(ctx); err != nil {
		return Ref{}, 0, err
	}
	defer w.fill.unlock()
	if err := w.failed(); err != nil {
		return Ref{}, 0, err
	}
	if w.cur != nil && w.full() {
		if err := w.seal(ctx); err != nil {
			return Ref{}, 0, err
		}
	}
	cost := int64(0)
	if w.cur == nil {
		var err error
		if w.cur, err = newPackBuilder(w.buffer(), w.kind, newPackID(), w.repo.repo, w.repo.keys); err != nil {
			return Ref{}, 0, err
		}
		cost = w.cur.overhead()
	}
	cost += w.cur.recordCost(len(stored))
	ref := Ref{Hash: h, Pack: w.cur.id, Ord: w.cur.add(stored, raw, how, h)}
	if w.full() {
		select { // begin the upload now if that needs no waiting
		case w.slots <- struct{}{}:
			w.upload()
		default:
		}
	}
	return ref, cost, nil
}

func newPackID() (id PackID) {
	_, _ = rand.Read(id[:]) // never fails
	return id
}

func (w *packWriter) buffer() []byte {
	goal := w.goal()
	want := goal + min(goal, packSlack)
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := len(w.bufs); n > 0; n = len(w.bufs) {
		b := w.bufs[n-1]
		w.bufs = w.bufs[:n-1]
		if cap(b) <= 2*want { // larger ones are of the time when there were fewer Writers
			return b
		}
	}
	// All of it at once: growing would copy what is in it again and again, and pages that
	// are never filled cost nothing.
	return make([]byte, 0, want)
}

// seal uploads the current pack once there is room. The caller holds fill.
func (w *packWriter) seal(ctx context.Context) error {
	select {
	case w.slots <- struct{}{}:
		w.upload()
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// upload puts the current pack in the background. The caller holds fill and has
// taken a slot, which the goroutine gives back as its last act: whoever holds
// all slots knows that none runs.
func (w *packWriter) upload() {
	b := w.cur
	w.cur = nil
	go func() {
		defer func() { <-w.slots }()
		name, doc := packName(b.id), b.finish()
		if err := w.repo.blobs.Put(w.life, name, bytes.NewReader(doc), int64(len(doc))); err != nil {
			w.fail(fmt.Errorf("write %s pack: %w", w.kind, err))
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.bufs = append(w.bufs, doc)
	}()
}

// send begins to put what is left.
func (w *packWriter) send(ctx context.Context) error {
	if err := w.fill.lock(ctx); err != nil {
		return err
	}
	defer w.fill.unlock()
	if err := w.sealLast(ctx); err != nil {
		return err
	}
	return w.failed()
}

// sealLast uploads what is left, if nothing has failed. The caller holds fill.
func (w *packWriter) sealLast(ctx context.Context) error {
	if w.cur != nil && w.failed() == nil {
		return w.seal(ctx)
	}
	return nil
}

// flush puts what is left and returns when every record added before is durable.
func (w *packWriter) flush(ctx context.Context) error {
	if err := w.fill.lock(ctx); err != nil {
		return err
	}
	defer w.fill.unlock()
	if err := w.sealLast(ctx); err != nil {
		return err
	}
	if err := w.idle(ctx); err != nil {
		return err
	}
	return w.failed()
}

// idle waits until no upload runs.
func (w *packWriter) idle(ctx context.Context) error {
	taken := 0
	defer func() {
		for range taken {
			<-w.slots
		}
	}()
	for range maxUploads {
		select {
		case w.slots <- struct{}{}:
			taken++
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// close stops uploads and waits for their end. Packs that were put stay: no point
// names them.
func (w *packWriter) close() {
	w.fail(errFinished)
	w.cancel()
	_ = w.idle(context.Background()) // cannot be cancelled
}
