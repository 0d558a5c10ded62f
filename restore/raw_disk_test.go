package restore_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

func TestRawDiskIsAWritableDisk(t *testing.T) {
	paths := map[restore.WritableDisk]string{}
	open := func(t *testing.T, path string) restore.WritableDisk {
		d, err := restore.OpenRaw(path, true)
		if err != nil {
			t.Fatal(err)
		}
		paths[d] = path
		return d
	}
	disktest.RunWritable(t, disktest.Writable{
		New: func(t *testing.T, content []byte) restore.WritableDisk {
			path := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			return open(t, path)
		},
		Reopen: func(t *testing.T, d restore.WritableDisk) restore.WritableDisk {
			if err := d.(*restore.RawDisk).Close(); err != nil {
				t.Fatal(err)
			}
			return open(t, paths[d])
		},
	})
}

func TestRawDiskHasOneWriter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := restore.OpenRaw(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := restore.OpenRaw(path, true); !errors.Is(err, restore.ErrRawBusy) {
		t.Errorf("a second writer: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := restore.OpenRaw(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if _, err := r.WriteAt([]byte{1}, 0); err == nil {
		t.Error("a reader wrote")
	}
	if _, err := restore.OpenRaw(filepath.Dir(path), false); !errors.Is(err, restore.ErrNotRaw) {
		t.Errorf("a directory: %v", err)
	}
}

// What the kernel may write past WriteAt is what the overlay has, in the place where it has it.
func TestOverlayTellsWhereItsBlocksAre(t *testing.T) {
	base := make(disktest.Bytes, 1<<20)
	o, _ := newOverlay(t, base)
	if _, _, ok := o.WriteFile(0, 64<<10); ok {
		t.Error("blocks of the base may be written in the file")
	}
	if _, err := o.WriteAt(make([]byte, 64<<10), 4096); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ off, n int64 }{{4095, 10}, {4096, 64<<10 + 1}, {-1, 1}, {1 << 20, 1}} {
		if _, _, ok := o.WriteFile(c.off, c.n); ok {
			t.Errorf("[%d, +%d) may be written", c.off, c.n)
		}
	}
	want := bytes.Repeat([]byte{7}, 1000)
	fd, at, ok := o.WriteFile(5000, int64(len(want)))
	if !ok {
		t.Fatal("blocks of the overlay may not be written")
	}
	if _, err := unix.Pwrite(int(fd), want, at); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := o.ReadAt(got, 5000); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the overlay reads something else, %v", err)
	}
	if err := o.Limit(1 << 20); err != nil {
		t.Fatal(err)
	}
	if _, _, ok := o.WriteFile(5000, 10); ok {
		t.Error("a limited overlay must count what is written")
	}
}
