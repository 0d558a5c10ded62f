package store

import (
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

// countingStore counts what an object store would be asked.
type countingStore struct {
	blob.Store

	mu       sync.Mutex
	requests int64
	bytes    int64
	ops      map[string]int64
}

// counting puts a countingStore between r and its objects.
func counting(r *Repo) *countingStore {
	c := &countingStore{Store: r.blobs, ops: map[string]int64{}}
	r.blobs = c
	return c
}

func (c *countingStore) count(op string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests++
	c.bytes += int64(n)
	c.ops[op]++
}

// since resets the counters and returns them.
func (c *countingStore) since() (requests, bytes int64, ops map[string]int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	requests, bytes, ops = c.requests, c.bytes, c.ops
	c.requests, c.bytes, c.ops = 0, 0, map[string]int64{}
	return requests, bytes, ops
}

func (c *countingStore) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	n, err := c.Store.ReadAt(ctx, name, p, off)
	c.count("read", n)
	return n, err
}

func (c *countingStore) ReadTail(ctx context.Context, name string, p []byte) (int, int64, error) {
	n, size, err := blob.ReadTail(ctx, c.Store, name, p)
	c.count("tail", n)
	return n, size, err
}

func (c *countingStore) Stat(ctx context.Context, name string) (blob.Info, error) {
	c.count("stat", 0)
	return c.Store.Stat(ctx, name)
}

func (c *countingStore) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	c.count("list", 0)
	return c.Store.List(ctx, prefix)
}

// requestRepo holds a disk of 64 MiB, half of it text, in packs of the usual size.
func requestRepo(t testing.TB) (*Repo, *Point) {
	t.Helper()
	r := testRepo(t)
	r.dataPackLen, r.nodePackLen = dataPackLen, nodePackLen
	const size = 64 << 20
	return r, backup(t, r, DiskOptions{Size: size}, write{0, benchContent(size)})
}

// TestRequestsPerRead bounds what reads ask of a store, cold and warm, and
// prints it.
func TestRequestsPerRead(t *testing.T) {
	base, p := requestRepo(t)
	root := p.Disks[0].Root
	levels := int64(root.Level) + 1
	w := tabwriter.NewWriter(os.Stderr, 0, 4, 2, ' ', 0)
	defer func() { _ = w.Flush() }()
	row := func(what string, n float64, requests, bytes int64) {
		_, _ = fmt.Fprintf(w, "%s\t%.2f requests\t%.1f KiB\n", what, float64(requests)/n, float64(bytes)/1024/n)
	}
	open := func() (*Repo, *countingStore, *Map) {
		r := reopen(t, base)
		c := counting(r)
		m, err := r.Map(root)
		if err != nil {
			t.Fatal(err)
		}
		return r, c, m
	}
	buf := make([]byte, k64)

	r, c, m := open()
	if _, err := m.Lookup(t.Context(), 600); err != nil {
		t.Fatal(err)
	}
	requests, bytes, ops := c.since()
	row("map look-up, cold", 1, requests, bytes)
	// Per pack of nodes: end and header. Per level: the node.
	if ops["stat"] != 0 || ops["list"] != 0 || ops["tail"] != 1 || requests > 2+levels {
		t.Errorf("a cold look-up in %d levels takes %v", levels, ops)
	}
	if _, err := m.Lookup(t.Context(), 601); err != nil {
		t.Fatal(err)
	}
	requests, bytes, _ = c.since()
	row("map look-up, warm", 1, requests, bytes)
	if requests != 0 {
		t.Errorf("a warm look-up takes %d requests", requests)
	}

	read := func(g int64) {
		t.Helper()
		ref, err := m.Lookup(t.Context(), g)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.ReadGrain(t.Context(), ref, buf); err != nil {
			t.Fatal(err)
		}
	}
	r, c, m = open()
	read(99)
	requests, bytes, _ = c.since()
	row("4 KiB random read, cold", 1, requests, bytes)
	if requests > 2+levels+2+1 {
		t.Errorf("a cold read takes %d requests", requests)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for g := range m.Grains() / 64 { // all nodes and indexes
		read(g * 64)
	}
	read(m.Grains() - 1) // of the last pack, which may be short
	c.since()
	const n = 300
	for range n {
		read(rnd.Int64N(m.Grains()))
	}
	requests, bytes, _ = c.since()
	row("4 KiB random read, maps and indexes warm", n, requests, bytes)
	if requests != n || bytes > n*k64 {
		t.Errorf("%d random reads take %d requests and %d bytes", n, requests, bytes)
	}

	sequential := func(what string) int64 {
		const grains = 64 // 4 MiB at once
		refs, dst := make([]Ref, grains), make([][]byte, grains)
		for i := range dst {
			dst[i] = make([]byte, k64)
		}
		for from := int64(0); from+grains <= m.Grains(); from += grains {
			if err := m.Refs(t.Context(), from, refs); err != nil {
				t.Fatal(err)
			}
			r.ReadGrains(t.Context(), refs, dst, func(i int, err error) {
				if err != nil {
					t.Errorf("grain %d: %v", from+int64(i), err)
				}
			})
		}
		requests, bytes, _ := c.since()
		row(what, float64(root.Size>>20), requests, bytes)
		return requests
	}
	if got := sequential("sequential MiB, maps and indexes warm"); got > root.Size>>20 {
		t.Errorf("%d requests for %d MiB", got, root.Size>>20)
	}
	r, c, m = open()
	if got := sequential("sequential MiB, cold"); got > root.Size>>20*3/2 {
		t.Errorf("%d requests for %d MiB", got, root.Size>>20)
	}
	// The map of the whole disk, as a restore asks for it.
	_, c, m = open()
	for _, err := range m.Runs(t.Context(), 0, m.Grains()) {
		if err != nil {
			t.Fatal(err)
		}
	}
	requests, bytes, _ = c.since()
	row(fmt.Sprintf("all runs of %d leaves, cold", m.Grains()/64), 1, requests, bytes)
	if requests > 2+levels+5 {
		t.Errorf("the runs of %d leaves take %d requests", m.Grains()/64, requests)
	}
}

// gapRepo holds grains of noise one after the other in few packs.
func gapRepo(t *testing.T, grains int64) (*Repo, *countingStore, []Ref) {
	t.Helper()
	base := testRepo(t)
	base.dataPackLen, base.nodePackLen = dataPackLen, nodePackLen
	p := backup(t, base, DiskOptions{Size: grains * 4096, Grain: 4096}, write{0, noise(7, int(grains)*4096)})
	r := reopen(t, base)
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	refs := make([]Ref, grains)
	if err := m.Refs(t.Context(), 0, refs); err != nil {
		t.Fatal(err)
	}
	if _, err := r.index(t.Context(), refs[0].Pack); err != nil {
		t.Fatal(err)
	}
	c := counting(r)
	return r, c, refs
}

func TestNeighboursAreReadAtOnceAndNoMore(t *testing.T) {
	r, c, refs := gapRepo(t, 1000)
	want := noise(7, 1000*4096)
	per := int64(4096) // bytes stored
	if r.Encrypted() {
		per += sealLen
	}
	for _, tt := range []struct {
		name            string
		grains          []int
		requests, bytes int64
	}{
		{"one", []int{5}, 1, per},
		{"neighbours", []int{5, 6, 7}, 1, 3 * per},
		{"in any order, twice", []int{7, 5, 6, 5}, 1, 3 * per},
		{"a gap that is worth it", []int{5, 21}, 1, 17 * per},
		{"a gap that is not", []int{5, 23}, 2, 2 * per},
		{"longer than a range", numbers(0, 600), 3, 600 * per},
		{"nothing", nil, 0, 0},
	} {
		some, dst := make([]Ref, len(tt.grains)), make([][]byte, len(tt.grains))
		for i, g := range tt.grains {
			some[i], dst[i] = refs[g], make([]byte, 4096)
		}
		done := make([]int32, len(some))
		var mu sync.Mutex
		r.ReadGrains(t.Context(), some, dst, func(i int, err error) {
			mu.Lock()
			defer mu.Unlock()
			if done[i]++; err != nil {
				t.Errorf("%s: %d: %v", tt.name, i, err)
			}
		})
		for i, g := range tt.grains {
			if done[i] != 1 || string(dst[i]) != string(want[g*4096:][:4096]) {
				t.Errorf("%s: grain %d: done %d times, or wrong content", tt.name, g, done[i])
			}
		}
		if n, b, _ := c.since(); n != tt.requests || b != tt.bytes {
			t.Errorf("%s: %d requests, %d bytes, want %d and %d", tt.name, n, b, tt.requests, tt.bytes)
		}
	}
}

func numbers(from, to int) (n []int) {
	for i := from; i < to; i++ {
		n = append(n, i)
	}
	return n
}

// What is damaged within a range must not take its neighbours with it.
func TestDamageWithinARangeIsTold(t *testing.T) {
	r, _, refs := gapRepo(t, 100)
	x, err := r.index(t.Context(), refs[0].Pack)
	if err != nil {
		t.Fatal(err)
	}
	e, _ := x.entry(refs[50].Ord)
	flip(t, r.Location()+"/"+packName(refs[50].Pack), int(e.off)*8+3)
	dst := make([][]byte, len(refs))
	for i := range dst {
		dst[i] = make([]byte, 4096)
	}
	errs := make([]error, len(refs))
	r.ReadGrains(t.Context(), refs, dst, func(i int, err error) { errs[i] = err })
	want := noise(7, 100*4096)
	for i, err := range errs {
		switch {
		case i == 50 && (err == nil || !strings.Contains(err.Error(), packName(refs[50].Pack)) || strings.Trim(string(dst[i]), "\x00") != ""):
			t.Errorf("the damaged grain gives %v", err)
		case i != 50 && (err != nil || string(dst[i]) != string(want[i*4096:][:4096])):
			t.Errorf("grain %d: %v", i, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.ReadGrains(ctx, refs, dst, func(i int, err error) {
		if err == nil {
			t.Errorf("grain %d was read with a cancelled context", i)
		}
	})
}

// gatedStore holds reads back until so many are on their way.
type gatedStore struct {
	blob.Store
	want int

	mu       sync.Mutex
	inside   int
	most     int
	released chan struct{}
}

func (g *gatedStore) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	g.mu.Lock()
	g.inside++
	g.most = max(g.most, g.inside)
	if g.inside == g.want {
		close(g.released)
	}
	g.mu.Unlock()
	select {
	case <-g.released:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	n, err := g.Store.ReadAt(ctx, name, p, off)
	g.mu.Lock()
	g.inside--
	g.mu.Unlock()
	return n, err
}

func TestSeveralRequestsAreOnTheirWay(t *testing.T) {
	r, _, refs := gapRepo(t, 2000)
	g := &gatedStore{Store: r.blobs, want: maxRequests, released: make(chan struct{})}
	r.blobs = g
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	some, dst := make([]Ref, 0, 50), make([][]byte, 0, 50)
	for i := 0; i < len(refs); i += 40 { // too far apart to be read at once
		some, dst = append(some, refs[i]), append(dst, make([]byte, 4096))
	}
	r.ReadGrains(ctx, some, dst, func(i int, err error) {
		if err != nil {
			t.Errorf("grain %d: %v", i, err)
		}
	})
	if g.most != maxRequests {
		t.Errorf("at most %d requests were on their way, want %d", g.most, maxRequests)
	}
}

// A difference is found by reading what leads to it, however large the disks are.
func TestRequestsPerDiff(t *testing.T) {
	r := testRepo(t)
	const size = 1 << 40
	var before []write
	for i := range int64(500) { // data all over the disk: 500 leaves
		before = append(before, write{i * (size / 500) &^ (k64 - 1), noise(uint64(i), k64)})
	}
	old := backup(t, r, DiskOptions{Size: size}, before...)
	one := backup(t, r, DiskOptions{Size: size}, write{size / 3 &^ (k64 - 1), noise(1000, k64)})
	many := backup(t, r, DiskOptions{Size: size}, func() (all []write) {
		for i := range int64(100) {
			all = append(all, write{before[i*5].off, noise(2000+uint64(i), k64)})
		}
		return all
	}()...)
	levels := int64(old.Disks[0].Root.Level) + 1
	diff := func(now, then *Point, most int) (grains int, requests int64) {
		r := reopen(t, r)
		c := counting(r)
		a, err := r.Map(now.Disks[0].Root)
		if err != nil {
			t.Fatal(err)
		}
		b, err := r.Map(then.Disks[0].Root)
		if err != nil {
			t.Fatal(err)
		}
		for run, err := range a.Diff(t.Context(), b, 0, a.Grains()) {
			if err != nil {
				t.Fatal(err)
			}
			if grains += int(run.To - run.From); grains >= most {
				break
			}
		}
		requests, bytes, _ := c.since()
		_, _ = fmt.Fprintf(os.Stderr, "difference of %d grains, 1 TiB, %d levels: %d requests, %.1f KiB\n", grains, levels, requests, float64(bytes)/1024)
		return grains, requests
	}
	// Two packs of nodes: end and header of each; and a node of each level and side.
	if grains, requests := diff(one, old, 1<<30); grains != 1 || requests > 2*2+2*levels {
		t.Errorf("one grain: %d found with %d requests", grains, requests)
	}
	// About one for each, not one for each node on the way (386). How near records lie, and so how many come with
	// one request, differs a little when they are sealed.
	if grains, requests := diff(many, old, 1<<30); grains != 101 || requests > 130 {
		t.Errorf("101 grains: %d found with %d requests", grains, requests)
	}
	if grains, requests := diff(many, old, 1); grains != 1 || requests > 3*2+3*levels {
		t.Errorf("the first of 101 grains: %d found with %d requests", grains, requests)
	}
	if grains, requests := diff(old, old, 1<<30); grains != 0 || requests != 0 {
		t.Errorf("nothing: %d found with %d requests", grains, requests)
	}
}
