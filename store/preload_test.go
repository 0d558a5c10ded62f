package store

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

// preloads notes what is asked for ahead.
type preloads struct {
	blob.Store
	mu    sync.Mutex
	asked []string
	err   error
}

func (p *preloads) Preload(_ context.Context, name string, off, n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, fmt.Sprintf("%s %d+%d", name, off, n))
	return p.err
}

func TestWindowsThatAreReadInManyPlacesArePreloadedOnce(t *testing.T) {
	r := testRepo(t)
	r.dataPackLen = dataPackLen
	image := noise(1, 40*k64)
	p := backup(t, r, DiskOptions{Size: int64(len(image))}, write{0, image})
	// What is told ahead is a favour: its failure is nobody's.
	store := &preloads{Store: r.blobs, err: blob.ErrNotFound}
	r = reopen(t, r)
	r.blobs = store
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, k64)
	read := func(grain int64) PackID {
		ref, err := m.Lookup(t.Context(), grain)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.ReadGrain(t.Context(), ref, dst); err != nil {
			t.Fatal(err)
		}
		return ref.Pack
	}
	// 16 grains of noise are a window, but for the header.
	read(0)
	read(9)
	read(20) // another window
	if len(store.asked) != 0 {
		t.Fatalf("after two reads of a window: %v", store.asked)
	}
	pack := read(4)
	want := []string{fmt.Sprintf("%s 0+%d", packName(pack), preloadWindow)}
	for g := range int64(12) {
		read(g)
	}
	if !slices.Equal(store.asked, want) {
		t.Errorf("asked for %v, want %v", store.asked, want)
	}
	for g := int64(20); g < 30; g++ {
		read(g)
	}
	if want = append(want, fmt.Sprintf("%s %d+%d", packName(pack), preloadWindow, preloadWindow)); !slices.Equal(store.asked, want) {
		t.Errorf("asked for %v, want %v", store.asked, want)
	}
}
