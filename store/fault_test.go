package store

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

// faultStore lets a test act before each Put, and count operations.
type faultStore struct {
	blob.Store
	before func(n int, name string) error // n counts Puts from 1

	mu  sync.Mutex
	n   int
	ops map[string]int // by "put:packs" and the like
}

// over puts a faultStore between r and its objects.
func over(r *Repo) *faultStore {
	f := &faultStore{Store: r.blobs, ops: map[string]int{}}
	r.blobs = f
	return f
}

func (f *faultStore) count(op, name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	folder, _, _ := strings.Cut(name, "/")
	f.ops[op+":"+folder]++
	if op == "put" {
		f.n++
	}
	return f.n
}

func (f *faultStore) total(op string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ops[op]
}

func (f *faultStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	n := f.count("put", name)
	if f.before != nil {
		if err := f.before(n, name); err != nil {
			return err
		}
	}
	return f.Store.Put(ctx, name, r, size)
}

func (f *faultStore) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	f.count("read", name)
	return f.Store.ReadAt(ctx, name, p, off)
}

func (f *faultStore) Lock(ctx context.Context, name string) (func() error, error) {
	return f.Store.(blob.Locker).Lock(ctx, name)
}

func TestFailedPackPutBreaksWriter(t *testing.T) {
	broken := errors.New("disk on fire")
	for _, kind := range []string{"data", "node", "point"} {
		t.Run(kind, func(t *testing.T) {
			r := testRepo(t)
			backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, 64<<10)})
			f := over(r)
			f.before = func(_ int, name string) error {
				switch packs := f.total("put:packs"); {
				case kind == "point" && strings.HasPrefix(name, "points/"),
					kind == "data" && strings.HasPrefix(name, "packs/"),
					kind == "node" && strings.HasPrefix(name, "packs/") && packs == 2:
					return broken
				}
				return nil
			}
			w, err := r.Begin(t.Context(), "a")
			if err != nil {
				t.Fatal(err)
			}
			d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Write(t.Context(), 64<<10, noise(2, 32<<10+32<<10)); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Commit(t.Context(), testPoint("disk0")); !errors.Is(err, broken) {
				t.Fatalf("Commit: %v, want %v", err, broken)
			}
			if _, err := w.Commit(t.Context(), testPoint("disk0")); err == nil {
				t.Fatal("a second Commit succeeded")
			}
			if err := d.Write(t.Context(), 0, noise(3, 64<<10)); err == nil {
				t.Error("Write after a failed Commit succeeded")
			}
			if err := w.Abort(); err != nil {
				t.Fatal(err)
			}
			if n, err := r.Points(t.Context(), "a"); err != nil || len(n) != 1 {
				t.Errorf("points: %v, %v", n, err)
			}
		})
	}
}

func TestFailedUploadFailsLaterWrites(t *testing.T) {
	broken := errors.New("disk on fire")
	r := testRepo(t)
	over(r).before = func(_ int, name string) error {
		if strings.HasPrefix(name, "packs/") {
			return broken
		}
		return nil
	}
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	p := noise(1, 64<<10)
	for i := range int64(1000) {
		p[0], p[1] = byte(i), byte(i>>8)
		if err = d.Write(t.Context(), i<<16, p); err != nil {
			break
		}
	}
	if !errors.Is(err, broken) {
		t.Fatalf("Write: %v, want %v", err, broken)
	}
	if err := d.Write(t.Context(), 0, make([]byte, 64<<10)); !errors.Is(err, broken) {
		t.Errorf("later Write: %v, want %v", err, broken)
	}
	if err := w.Abort(); err != nil {
		t.Fatal(err)
	}
}
