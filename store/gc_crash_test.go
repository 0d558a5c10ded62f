package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

var errKilled = errors.New("killed")

// mortalStore is what a process sees that dies in its nth change of the repository:
// before or after the change has its effect. Nothing works from then on.
type mortalStore struct {
	blob.Store
	dieIn int // 0: never
	after bool

	mu   sync.Mutex
	n    int
	dead bool
	ops  []string
}

func (m *mortalStore) change(op, name string, do func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return errKilled
	}
	m.n++
	m.ops = append(m.ops, op+" "+name)
	if m.n != m.dieIn {
		return do()
	}
	m.dead = true
	if m.after {
		_ = do()
	}
	return errKilled
}

func (m *mortalStore) alive() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return errKilled
	}
	return nil
}

func (m *mortalStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	return m.change("put", name, func() error { return m.Store.Put(ctx, name, r, size) })
}

func (m *mortalStore) Delete(ctx context.Context, name string) error {
	return m.change("delete", name, func() error { return m.Store.Delete(ctx, name) })
}

func (m *mortalStore) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error) {
	if err := m.alive(); err != nil {
		return nil, err
	}
	return m.Store.Get(ctx, name, off, n)
}

func (m *mortalStore) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if err := m.alive(); err != nil {
		return 0, err
	}
	return m.Store.ReadAt(ctx, name, p, off)
}

func (m *mortalStore) Stat(ctx context.Context, name string) (blob.Info, error) {
	if err := m.alive(); err != nil {
		return blob.Info{}, err
	}
	return m.Store.Stat(ctx, name)
}

func (m *mortalStore) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	if err := m.alive(); err != nil {
		return func(yield func(blob.Info, error) bool) { yield(blob.Info{}, err) }
	}
	return m.Store.List(ctx, prefix)
}

// openMem opens a repository in objects, with small packs.
func openMem(t testing.TB, b blob.Store) *Repo {
	t.Helper()
	r, err := openOn(t.Context(), b, "mem", testKey()...)
	if err != nil {
		t.Fatal(err)
	}
	r.dataPackLen, r.nodePackLen = 24<<10, 2<<10
	return r
}

func newStill(t testing.TB) *memStore {
	t.Helper()
	m := newMemStore(1)
	m.still = true
	if _, err := initOn(t.Context(), m, "mem", testNew()...); err != nil {
		t.Fatal(err)
	}
	return m
}

// clone returns a store with the same objects.
func (m *memStore) clone() *memStore {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := newMemStore(1)
	n.still = true
	n.objects = maps.Clone(m.objects)
	return n
}

// oldPoints fills a repository with points whose forgetting leaves packs that are dead, and
// others that are partly so.
func oldPoints(t testing.TB, m *memStore) (points []*Point, images [][]byte) {
	t.Helper()
	r := openMem(t, m)
	image := make([]byte, 200*4096)
	for n := range uint64(5) {
		writes := []write{}
		for k := range uint64(8) {
			off := int64((n*3+k*k)%30) * 4096
			p := noise(n*100+k, 4096)
			copy(image[off:], p)
			writes = append(writes, write{off, p})
		}
		points = append(points, backup(t, r, DiskOptions{Size: int64(len(image)), Grain: 4096}, writes...))
		images = append(images, slices.Clone(image))
	}
	return points, images
}

// TestKilledInEveryChange kills forgetting, collecting and backing up at every change they
// make to the repository.
func TestKilledInEveryChange(t *testing.T) {
	t.Parallel()
	base := newStill(t)
	points, images := oldPoints(t, base)
	script := func(b blob.Store) (acked []*Point, err error) {
		r, err := openOn(t.Context(), b, "mem", testKey()...)
		if err != nil {
			return nil, err
		}
		r.dataPackLen, r.nodePackLen = 24<<10, 2<<10
		if _, err := r.GC(t.Context(), GCOptions{Garbage: 0.01, grace: 1}); err != nil {
			return nil, err
		}
		for _, n := range []PointName{points[0].Name(), points[2].Name()} {
			if _, err := r.Forget(t.Context(), []PointName{n}, nil); err != nil {
				return nil, err
			}
			if _, err := r.GC(t.Context(), GCOptions{Garbage: 0.01, grace: 1}); err != nil {
				return nil, err
			}
		}
		w, err := r.Begin(t.Context(), "a")
		if err != nil {
			return nil, err
		}
		defer func() { _ = w.Abort() }()
		d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: int64(len(images[0])), Grain: 4096, Dedup: true})
		if err != nil {
			return nil, err
		}
		// What was garbage a moment ago, and something new.
		if err := errors.Join(d.Write(t.Context(), 0, images[0][:32*4096]), d.Write(t.Context(), 64*4096, noise(999, 4096))); err != nil {
			return nil, err
		}
		p, err := w.Commit(t.Context(), testPoint("disk0"))
		if err != nil {
			return nil, err
		}
		_, err = r.GC(t.Context(), GCOptions{Garbage: 0.01, grace: 1})
		return []*Point{p}, err
	}
	dry := &mortalStore{Store: base.clone()}
	if _, err := script(dry); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	for _, op := range dry.ops {
		verb, name, _ := strings.Cut(op, " ")
		folder, _, _ := strings.Cut(name, "/")
		kinds[verb+" "+folder]++
	}
	t.Logf("%d changes: %v", dry.n, kinds)
	if kinds["put packs"] < 4 || kinds["delete packs"] < 4 || kinds["delete points"] != 2 || kinds["delete gc"] == 0 || kinds["delete sessions"] == 0 {
		t.Fatal("the script does too little")
	}
	last := slices.Clone(images[4])
	copy(last, images[0][:32*4096])
	copy(last[64*4096:], noise(999, 4096))
	for op := 1; op <= dry.n; op++ {
		for _, after := range []bool{false, true} {
			m := base.clone()
			acked, err := script(&mortalStore{Store: m, dieIn: op, after: after})
			if !errors.Is(err, errKilled) && op < dry.n-4 { // the last ones only tidy up
				t.Fatalf("change %d: %v", op, err)
			}
			what := fmt.Sprintf("killed in %s, after: %v", dry.ops[op-1], after)
			checkSurvivors(t, m, what, points, images, acked, last)
			r := openMem(t, m)
			for range 2 {
				if _, err := r.GC(t.Context(), GCOptions{Garbage: 1e-9, Patience: 1, grace: 1}); err != nil {
					t.Fatalf("%s: the next gc: %v", what, err)
				}
			}
			checkSurvivors(t, m, what+", and collected", points, images, acked, last)
			rep, err := openMem(t, m).GC(t.Context(), GCOptions{DryRun: true})
			if err != nil || rep.Garbage != 0 {
				t.Errorf("%s: garbage is left: %+v, %v", what, rep, err)
			}
			if t.Failed() {
				t.FailNow()
			}
		}
	}
}

// checkSurvivors reads every point that is listed as anybody would. Those that nobody forgot, and those
// acknowledged, must be there.
func checkSurvivors(t *testing.T, m *memStore, what string, points []*Point, images [][]byte, acked []*Point, last []byte) {
	t.Helper()
	r := openMem(t, m.clone())
	names, err := r.allPoints(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		want := last
		if i := slices.IndexFunc(points, func(p *Point) bool { return p.Name() == n }); i >= 0 {
			want = images[i]
		}
		p, err := r.Point(t.Context(), n)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		wantClean(t, r, p)
		wantDisk(t, r, p, want)
	}
	for i, p := range append(slices.Clone(points), acked...) {
		if i != 0 && i != 2 && !slices.Contains(names, p.Name()) {
			t.Errorf("%s: %s is lost", what, p.Name())
		}
	}
}
