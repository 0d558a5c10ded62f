package store

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

// memStore keeps objects in memory, without locks. Each operation takes a random time
// before it has its effect and after it: mostly short, now and then long enough for
// everybody else to do a lot. Within synctest that costs nothing. It promises what
// [blob.Store] does and no more: a listing shows or hides what changes meanwhile.
type memStore struct {
	mu      sync.Mutex
	objects map[string][]byte
	rnd     *rand.Rand
	still   bool // no delays

	forbid func(op, name string) error // may be nil
}

func newMemStore(seed uint64) *memStore {
	return &memStore{objects: map[string][]byte{}, rnd: rand.New(rand.NewPCG(seed, 1))}
}

func (m *memStore) pause(op, name string) error {
	m.mu.Lock()
	d := time.Duration(m.rnd.IntN(1000)) * time.Microsecond
	switch m.rnd.IntN(300) {
	case 0:
		d *= 5000 // up to 5 s
	case 1, 2, 3, 4, 5, 6, 7, 8:
		d *= 100
	}
	still, forbid := m.still, m.forbid
	m.mu.Unlock()
	if !still {
		time.Sleep(d)
	}
	if forbid != nil {
		return forbid(op, name)
	}
	return nil
}

func (m *memStore) Put(_ context.Context, name string, r io.Reader, size int64) error {
	p, err := io.ReadAll(r)
	if err != nil || int64(len(p)) != size {
		return fmt.Errorf("put %s: %d bytes of %d, %w", name, len(p), size, err)
	}
	if err := m.pause("put", name); err != nil {
		return err
	}
	m.mu.Lock()
	_, taken := m.objects[name]
	if !taken {
		m.objects[name] = p
	}
	m.mu.Unlock()
	_ = m.pause("", "")
	if taken {
		return fmt.Errorf("put %s: %w", name, blob.ErrExists)
	}
	return nil
}

func (m *memStore) object(op, name string) ([]byte, error) {
	if err := m.pause(op, name); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p, ok := m.objects[name]
	if !ok {
		return nil, fmt.Errorf("%s %s: %w", op, name, blob.ErrNotFound)
	}
	return p, nil
}

func (m *memStore) Get(_ context.Context, name string, off, n int64) (io.ReadCloser, error) {
	p, err := m.object("get", name)
	if err != nil {
		return nil, err
	}
	p = p[min(off, int64(len(p))):]
	if n >= 0 {
		p = p[:min(n, int64(len(p)))]
	}
	return io.NopCloser(bytes.NewReader(p)), nil
}

func (m *memStore) ReadAt(_ context.Context, name string, p []byte, off int64) (int, error) {
	o, err := m.object("read", name)
	if err != nil {
		return 0, err
	}
	return bytes.NewReader(o).ReadAt(p, off)
}

func (m *memStore) Stat(_ context.Context, name string) (blob.Info, error) {
	p, err := m.object("stat", name)
	return blob.Info{Name: name, Size: int64(len(p))}, err
}

func (m *memStore) List(_ context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		if err := m.pause("list", prefix); err != nil {
			yield(blob.Info{}, err)
			return
		}
		m.mu.Lock()
		names := slices.Sorted(maps.Keys(m.objects))
		hides := m.rnd.IntN(2) == 0
		sizes := map[string]int{}
		for _, n := range names {
			sizes[n] = len(m.objects[n])
		}
		m.mu.Unlock()
		for _, n := range names {
			if !strings.HasPrefix(n, prefix) {
				continue
			}
			if hides {
				_ = m.pause("", "")
				m.mu.Lock()
				_, there := m.objects[n]
				m.mu.Unlock()
				if !there {
					continue
				}
			}
			if !yield(blob.Info{Name: n, Size: int64(sizes[n])}, nil) {
				return
			}
		}
		_ = m.pause("", "")
	}
}

func (m *memStore) ListDirs(_ context.Context, prefix string) ([]string, error) {
	if err := m.pause("list", prefix); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	dirs := map[string]bool{}
	for n := range m.objects {
		if rest, ok := strings.CutPrefix(n, prefix); ok {
			if dir, _, ok := strings.Cut(rest, "/"); ok {
				dirs[dir] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(dirs)), nil
}

func (m *memStore) Delete(_ context.Context, name string) error {
	if err := m.pause("delete", name); err != nil {
		return err
	}
	m.mu.Lock()
	_, there := m.objects[name]
	delete(m.objects, name)
	m.mu.Unlock()
	_ = m.pause("", "")
	if !there {
		return fmt.Errorf("delete %s: %w", name, blob.ErrNotFound)
	}
	return nil
}

func (m *memStore) Close() error { return nil }

// names lists the objects below a folder at once.
func (m *memStore) names(prefix string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for _, n := range slices.Sorted(maps.Keys(m.objects)) {
		if strings.HasPrefix(n, prefix) {
			out = append(out, n)
		}
	}
	return out
}

// be sets whether operations take no time.
func (m *memStore) be(still bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.still = still
}
