package faultblob

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/tidemark/tidemark/store/blob"
)

// Layer numbers the moments of all stores that it lies over. Safe for concurrent use.
type Layer struct {
	handler Handler
	only    func(Event) bool
	n       atomic.Int64
	power   *power // nil: it never fails

	mu  sync.Mutex
	log func(Event)
}

// New returns a Layer that asks h; nil: nothing ever fails.
func New(h Handler) *Layer {
	if h == nil {
		h = func(context.Context, Event) error { return nil }
	}
	return &Layer{handler: h, only: func(Event) bool { return true }}
}

// Only limits the Layer to the moments that keep tells; others are not numbered and
// nothing happens at them. Before the first use.
func (l *Layer) Only(keep func(Event) bool) { l.only = keep }

// Log has f called at each moment, one at a time. Before the first use.
func (l *Layer) Log(f func(Event)) { l.log = f }

// Count is the number of moments so far.
func (l *Layer) Count() int64 { return l.n.Load() }

// at is a moment.
func (l *Layer) at(ctx context.Context, op Op, when When, name string) error {
	e := Event{Op: op, When: when, Name: name}
	if !l.only(e) {
		return nil
	}
	e.N = l.n.Add(1)
	if l.log != nil {
		l.mu.Lock()
		l.log(e)
		l.mu.Unlock()
	}
	return l.handler(ctx, e)
}

// Watch makes the steps of d moments. d must not have been used.
func (l *Layer) Watch(d *blob.Dir) {
	d.Watch(func(s blob.Step) error {
		err := l.at(context.Background(), Op(stepPrefix+s.Op), Before, s.Path)
		if err != nil && !isRepeat(err) {
			return err
		}
		if l.power != nil {
			return l.power.step(d.Path(), s)
		}
		return nil
	})
}

// Over returns s below the Layer. It is a blob.Locker and a blob.TailReader as far as s is. Closing it closes s.
func (l *Layer) Over(s blob.Store) blob.Store {
	f := &store{l, s}
	locker, locks := s.(blob.Locker)
	tailer, tails := s.(blob.TailReader)
	switch {
	case locks && tails:
		return struct {
			*store
			locking
			tailing
		}{f, locking{f, locker}, tailing{f, tailer}}
	case locks:
		return struct {
			*store
			locking
		}{f, locking{f, locker}}
	case tails:
		return struct {
			*store
			tailing
		}{f, tailing{f, tailer}}
	}
	return f
}

type store struct {
	l    *Layer
	next blob.Store
}

var (
	_ blob.Store      = (*store)(nil)
	_ blob.Locker     = locking{}
	_ blob.TailReader = tailing{}
)

// do runs an operation that may be repeated.
func (s *store) do(ctx context.Context, op Op, name string, f func() error) error {
	err := s.l.at(ctx, op, Before, name)
	if err != nil && !isRepeat(err) {
		return err
	}
	again := err != nil
	if err = f(); again {
		_ = f() // its answer goes nowhere
	}
	if err != nil {
		return err
	}
	return s.after(ctx, op, name)
}

func (s *store) after(ctx context.Context, op Op, name string) error {
	if err := s.l.at(ctx, op, After, name); err != nil && !isRepeat(err) {
		return err
	}
	return nil
}

// before is for operations that are not repeated.
func (s *store) before(ctx context.Context, op Op, name string) error {
	if err := s.l.at(ctx, op, Before, name); err != nil && !isRepeat(err) {
		return err
	}
	return nil
}

func (s *store) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	var sent bytes.Buffer // to be sent again
	first := true
	return s.do(ctx, Put, name, func() error {
		if !first {
			return s.next.Put(ctx, name, bytes.NewReader(sent.Bytes()), size)
		}
		first = false
		half := io.LimitReader(r, size/2)
		middle := hook(func() error { return s.middle(ctx, Put, name) })
		return s.next.Put(ctx, name, io.TeeReader(io.MultiReader(half, middle, r), &sent), size)
	})
}

func (s *store) middle(ctx context.Context, op Op, name string) error {
	if err := s.l.at(ctx, op, Middle, name); err != nil && !isRepeat(err) {
		return err
	}
	return nil
}

// hook is a reader without bytes that calls when it is reached.
type hook func() error

func (h hook) Read([]byte) (int, error) {
	if err := h(); err != nil {
		return 0, err
	}
	return 0, io.EOF
}

func (s *store) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error) {
	if err := s.before(ctx, Get, name); err != nil {
		return nil, err
	}
	r, err := s.next.Get(ctx, name, off, n)
	if err != nil {
		return nil, err
	}
	if err := s.after(ctx, Get, name); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return &torn{s: s, ctx: ctx, name: name, r: r}, nil
}

// torn has its middle before the second read.
type torn struct {
	s     *store
	ctx   context.Context
	name  string
	r     io.ReadCloser
	reads int
	err   error
}

func (t *torn) Read(p []byte) (int, error) {
	if t.err != nil {
		return 0, t.err
	}
	if t.reads++; t.reads == 2 {
		if t.err = t.s.middle(t.ctx, Get, t.name); t.err != nil {
			return 0, t.err
		}
	}
	if t.reads == 1 && len(p) > 1 {
		p = p[:len(p)/2] // so that there is a second
	}
	return t.r.Read(p)
}

func (t *torn) Close() error { return t.r.Close() }

func (s *store) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	return s.read(ctx, ReadAt, name, p, func() (int, error) { return s.next.ReadAt(ctx, name, p, off) })
}

func (s *store) read(ctx context.Context, op Op, name string, p []byte, f func() (int, error)) (int, error) {
	if err := s.before(ctx, op, name); err != nil {
		return 0, err
	}
	n, err := f()
	if merr := s.middle(ctx, op, name); merr != nil {
		// Half of it, and garbage where the caller must not look.
		for i := n / 2; i < len(p); i++ {
			p[i] = 0xa5
		}
		return n / 2, merr
	}
	if aerr := s.after(ctx, op, name); aerr != nil {
		return 0, aerr
	}
	return n, err
}

func (s *store) Stat(ctx context.Context, name string) (info blob.Info, err error) {
	first := true
	err = s.do(ctx, Stat, name, func() error {
		i, err := s.next.Stat(ctx, name)
		if first {
			info, first = i, false
		}
		return err
	})
	if err != nil {
		info = blob.Info{}
	}
	return info, err
}

func (s *store) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		if err := s.before(ctx, List, prefix); err != nil {
			yield(blob.Info{}, err)
			return
		}
		n := 0
		for info, err := range s.next.List(ctx, prefix) {
			if n++; n == 2 && err == nil {
				if err = s.middle(ctx, List, prefix); err != nil {
					info = blob.Info{}
				}
			}
			if !yield(info, err) || err != nil {
				return
			}
		}
		if err := s.after(ctx, List, prefix); err != nil {
			yield(blob.Info{}, err)
		}
	}
}

func (s *store) ListDirs(ctx context.Context, prefix string) ([]string, error) {
	if err := s.before(ctx, ListDirs, prefix); err != nil {
		return nil, err
	}
	dirs, err := s.next.ListDirs(ctx, prefix)
	if err != nil {
		return nil, err
	}
	return dirs, s.after(ctx, ListDirs, prefix)
}

func (s *store) Delete(ctx context.Context, name string) error {
	return s.do(ctx, Delete, name, func() error { return s.next.Delete(ctx, name) })
}

func (s *store) Close() error { return s.next.Close() }

type tailing struct {
	s    *store
	next blob.TailReader
}

// ReadTail implements blob.TailReader.
func (t tailing) ReadTail(ctx context.Context, name string, p []byte) (n int, size int64, err error) {
	n, err = t.s.read(ctx, ReadTail, name, p, func() (n int, err error) {
		n, size, err = t.next.ReadTail(ctx, name, p)
		return n, err
	})
	return n, size, err
}

type locking struct {
	s    *store
	next blob.Locker
}

// Lock implements blob.Locker.
func (k locking) Lock(ctx context.Context, name string) (func() error, error) {
	if err := k.s.before(ctx, Lock, name); err != nil {
		return nil, err
	}
	unlock, err := k.next.Lock(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := k.s.after(ctx, Lock, name); err != nil {
		return nil, errors.Join(err, unlock())
	}
	return func() error {
		// A lock that is not given back for good is no fault that storage has.
		ctx := context.WithoutCancel(ctx)
		err := k.s.before(ctx, Unlock, name)
		return errors.Join(unlock(), err, k.s.after(ctx, Unlock, name))
	}, nil
}
