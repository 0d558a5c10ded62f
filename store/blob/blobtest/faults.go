package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

// Faults tests what must hold of a store whose operations fail now and then: what it
// says is true, whatever it says. open returns a new empty store that fails, and what ends its
// failing; seed differs each time.
func Faults(t *testing.T, rounds int, open func(t *testing.T, seed uint64) (s blob.Store, calm func())) {
	for round := range rounds {
		seed := uint64(round + 1)
		s, calm := open(t, seed)
		m := &model{t: t, s: s, objects: map[string]*object{}}
		// A few hands, each with names of its own; all under one prefix.
		var hands sync.WaitGroup
		for h := range 3 {
			hands.Go(func() { m.work(t.Context(), seed, h) })
		}
		hands.Wait()
		calm()
		m.settle(t.Context())
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
		if m.faults == 0 {
			t.Errorf("seed %d: nothing failed", seed)
		}
		t.Logf("seed %d: %d operations failed", seed, m.faults)
	}
}

// model knows what each object may be.
type model struct {
	t *testing.T
	s blob.Store

	mu      sync.Mutex
	objects map[string]*object
	faults  int
}

// object says what may be true: a failed operation may have had its effect.
type object struct {
	absent   bool
	contents [][]byte // any one of them
}

func (m *model) work(ctx context.Context, seed uint64, hand int) {
	rnd := rand.New(rand.NewPCG(seed, uint64(hand)))
	for i := range 60 {
		name := fmt.Sprintf("h%d/o%d", hand, rnd.IntN(8))
		m.mu.Lock()
		o := m.objects[name]
		if o == nil {
			o = &object{absent: true}
			m.objects[name] = o
		}
		m.mu.Unlock()
		switch rnd.IntN(7) {
		case 0, 1:
			content := bytes.Repeat([]byte(fmt.Sprintf("%s by %d;", name, i)), 1+rnd.IntN(4000))
			m.put(ctx, name, o, content)
		case 2:
			m.read(ctx, name, o, rnd)
		case 3:
			m.get(ctx, name, o)
		case 4:
			m.list(ctx, fmt.Sprintf("h%d/", hand))
		case 5:
			m.delete(ctx, name, o)
		case 6:
			m.tail(ctx, name, o, rnd)
		}
	}
}

func (m *model) failed(err error) {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, context.Canceled) {
		m.t.Errorf("a failure says that an object ended, or that the caller gave up: %v", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults++
}

func (m *model) put(ctx context.Context, name string, o *object, content []byte) {
	// Not a *bytes.Reader every time: backends may treat that apart.
	var r io.Reader = bytes.NewReader(content)
	if len(content)%2 == 0 {
		r = io.MultiReader(r)
	}
	err := m.s.Put(ctx, name, r, int64(len(content)))
	switch {
	case err == nil:
		if !o.absent {
			m.t.Errorf("Put(%s) succeeded; it was there", name)
		}
		*o = object{contents: [][]byte{content}}
	case errors.Is(err, blob.ErrExists):
		if len(o.contents) == 0 {
			m.t.Errorf("Put(%s): %v; it was not there", name, err)
		}
		o.absent = false
	default:
		m.failed(err)
		if o.absent {
			o.contents = append(o.contents, content)
		}
	}
}

// saw narrows o to what was read.
func (m *model) saw(name string, o *object, got []byte, err error) {
	switch {
	case errors.Is(err, blob.ErrNotFound):
		if !o.absent {
			m.t.Errorf("%s: %v; it was there", name, err)
		}
		*o = object{absent: true}
	case err != nil:
		m.failed(err)
	default:
		i := slices.IndexFunc(o.contents, func(c []byte) bool { return bytes.Equal(c, got) })
		if i < 0 {
			m.t.Errorf("%s: read %d bytes that were never put there", name, len(got))
			return
		}
		*o = object{contents: o.contents[i : i+1]}
	}
}

func (m *model) get(ctx context.Context, name string, o *object) {
	r, err := m.s.Get(ctx, name, 0, -1)
	if err != nil {
		m.saw(name, o, nil, err)
		return
	}
	got, err := io.ReadAll(r)
	_ = r.Close()
	m.saw(name, o, got, err)
}

func (m *model) read(ctx context.Context, name string, o *object, rnd *rand.Rand) {
	info, err := m.s.Stat(ctx, name)
	if err != nil {
		m.saw(name, o, nil, err)
		return
	}
	off := rnd.Int64N(info.Size + 2)
	p := make([]byte, rnd.IntN(3000)+1)
	n, err := m.s.ReadAt(ctx, name, p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		m.failed(err)
		return
	}
	for _, c := range o.contents {
		want := c[min(off, int64(len(c))):]
		want = want[:min(len(want), len(p))]
		if bytes.Equal(p[:n], want) && errors.Is(err, io.EOF) == (len(want) < len(p)) {
			return
		}
	}
	m.t.Errorf("ReadAt(%s, %d bytes from %d of %d) = %d bytes, %v: never put there", name, len(p), off, info.Size, n, err)
}

func (m *model) tail(ctx context.Context, name string, o *object, rnd *rand.Rand) {
	p := make([]byte, rnd.IntN(3000)+1)
	n, size, err := blob.ReadTail(ctx, m.s, name, p)
	if err != nil {
		m.saw(name, o, nil, err)
		return
	}
	for _, c := range o.contents {
		if int64(len(c)) == size && bytes.Equal(p[:n], c[max(0, len(c)-len(p)):]) {
			return
		}
	}
	m.t.Errorf("ReadTail(%s, %d bytes) = %d bytes of %d: never put there", name, len(p), n, size)
}

func (m *model) list(ctx context.Context, prefix string) {
	seen := map[string]int64{}
	for info, err := range m.s.List(ctx, prefix) {
		if err != nil {
			m.failed(err)
			return
		}
		seen[info.Name] = info.Size
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, o := range m.objects {
		if len(name) < len(prefix) || name[:len(prefix)] != prefix {
			continue
		}
		size, ok := seen[name]
		if !ok && !o.absent {
			m.t.Errorf("List: %s is missing", name)
		}
		if ok && !slices.ContainsFunc(o.contents, func(c []byte) bool { return int64(len(c)) == size }) {
			m.t.Errorf("List: %s has %d bytes; never put so", name, size)
		}
	}
}

func (m *model) delete(ctx context.Context, name string, o *object) {
	err := m.s.Delete(ctx, name)
	switch {
	case err == nil:
		if len(o.contents) == 0 {
			m.t.Errorf("Delete(%s) succeeded; there was nothing", name)
		}
		*o = object{absent: true}
	case errors.Is(err, blob.ErrNotFound):
		if !o.absent {
			m.t.Errorf("Delete(%s): %v; it was there", name, err)
		}
		*o = object{absent: true}
	default:
		m.failed(err)
		o.absent = true
	}
}

// settle looks at everything once nothing fails any more.
func (m *model) settle(ctx context.Context) {
	before := m.faults
	for name, o := range m.objects {
		m.get(ctx, name, o)
	}
	m.list(ctx, "")
	if m.faults != before {
		m.t.Errorf("%d operations failed after the faults ended", m.faults-before)
	}
}
