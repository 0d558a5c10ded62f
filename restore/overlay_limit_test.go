package restore_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

func TestLimitedOverlayIsAWritableDisk(t *testing.T) {
	paths, bases := map[restore.WritableDisk]string{}, map[restore.WritableDisk]restore.Disk{}
	limited := func(t *testing.T, o *restore.Overlay, err error, path string, base restore.Disk) restore.WritableDisk {
		t.Helper()
		if err == nil {
			err = o.Limit(1 << 40)
		}
		if err != nil {
			t.Fatal(err)
		}
		paths[o], bases[o] = path, base
		return o
	}
	disktest.RunWritable(t, disktest.Writable{
		New: func(t *testing.T, content []byte) restore.WritableDisk {
			path, base := filepath.Join(t.TempDir(), "overlay"), disktest.Bytes(content)
			o, err := restore.CreateOverlay(path, base, identity)
			return limited(t, o, err, path, base)
		},
		Reopen: func(t *testing.T, d restore.WritableDisk) restore.WritableDisk {
			if err := d.(*restore.Overlay).Close(); err != nil {
				t.Fatal(err)
			}
			o, err := restore.OpenOverlay(paths[d], bases[d], identity)
			return limited(t, o, err, paths[d], bases[d])
		},
	})
}

func TestOverlayKeepsItsLimit(t *testing.T) {
	const size, limit = 64 << 20, 1 << 20
	o, path := newOverlay(t, disktest.Bytes(bytes.Repeat([]byte("b"), size)))
	if err := o.Limit(limit + 4095); err != nil {
		t.Fatal(err)
	}
	full := bytes.Repeat([]byte("x"), limit)
	if _, err := o.WriteAt(full, 8<<20); err != nil {
		t.Fatal(err)
	}
	// One byte more is too much, and says what is the matter.
	n, err := o.WriteAt([]byte("y"), 0)
	if n != 0 || !errors.Is(err, restore.ErrOverlayFull) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("one byte too many: %d, %v", n, err)
	}
	p := make([]byte, 4096)
	if _, err := o.ReadAt(p, 0); err != nil || !bytes.Equal(p, bytes.Repeat([]byte("b"), 4096)) {
		t.Errorf("the block that could not be written changed: %v", err)
	}
	// What is there can be changed; a write across the edge stops at it.
	if _, err := o.WriteAt(bytes.Repeat([]byte("z"), 5000), 8<<20+100); err != nil {
		t.Errorf("a write to blocks that are there: %v", err)
	}
	if _, err := o.WriteAt(full, 9<<20-4096); !errors.Is(err, restore.ErrOverlayFull) {
		t.Errorf("a write across the edge: %v", err)
	}
	// Zeroes that take whole blocks cost nothing; trimming gives back.
	if err := o.Zero(32<<20, 16<<20); err != nil {
		t.Errorf("zeroes: %v", err)
	}
	if err := o.Trim(8<<20, limit/2); err != nil {
		t.Fatal(err)
	}
	if u := o.Used(); u != limit/2 {
		t.Errorf("%d bytes are used, want %d", u, limit/2)
	}
	if _, err := o.WriteAt(full[:limit/2], 40<<20); err != nil {
		t.Errorf("room that was given back: %v", err)
	}
	if _, err := o.WriteAt(full[:1], 0); !errors.Is(err, restore.ErrOverlayFull) {
		t.Errorf("full again: %v", err)
	}
	if err := o.Sync(); err != nil {
		t.Fatal(err)
	}
	if a := o.Allocated(); a > limit+64<<10 {
		t.Errorf("the file takes %d bytes", a)
	}
	// The next process counts what is there.
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	o, err = restore.OpenOverlay(path, disktest.Bytes(bytes.Repeat([]byte("b"), size)), identity)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	if err := o.Limit(limit); err != nil {
		t.Fatal(err)
	}
	if u := o.Used(); u != limit {
		t.Errorf("%d bytes are used after opening again, want %d", u, limit)
	}
	if _, err := o.WriteAt(full[:1], 0); !errors.Is(err, restore.ErrOverlayFull) {
		t.Errorf("full after opening again: %v", err)
	}
	if err := o.Limit(limit); err == nil {
		t.Error("a second limit was taken")
	}
}

// Writers and trimmers at the same blocks must not make the overlay lose count.
func TestOverlayCountsBesideConcurrentTrims(t *testing.T) {
	const size, limit = 8 << 20, 2 << 20
	o, path := newOverlay(t, emptyDisk(size))
	if err := o.Limit(limit); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 5))
			for range 2000 {
				off, n := rnd.Int64N(size-64<<10), 1+rnd.Int64N(64<<10)
				if rnd.IntN(2) == 0 {
					if err := o.Trim(off, n); err != nil && !errors.Is(err, restore.ErrOverlayFull) {
						t.Error(err)
					}
				} else if _, err := o.WriteAt(bytes.Repeat([]byte{1}, int(n)), off); err != nil && !errors.Is(err, restore.ErrOverlayFull) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := o.Sync(); err != nil {
		t.Fatal(err)
	}
	used := o.Used()
	if used > limit {
		t.Errorf("%d bytes are used of %d", used, limit)
	}
	// What the file system says is what was counted.
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := restore.OpenOverlay(path, emptyDisk(size), identity)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Close() }()
	if err := again.Limit(limit); err != nil {
		t.Fatal(err)
	}
	if u := again.Used(); u > used {
		t.Errorf("the file holds %d bytes of data, counted were %d", u, used)
	}
}
