package cbt_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// fileSystems are those whose files can be tracked.
var fileSystems = []string{"ext4", "xfs", "btrfs"}

// mountNew makes a file system on a loop device, whose writes take delay, and mounts it.
func mountNew(t *testing.T, fstype string, delay time.Duration, options string) string {
	t.Helper()
	mkfs, err := exec.LookPath("mkfs." + fstype)
	if err != nil {
		t.Skipf("SKIP: no mkfs.%s (apt-get install e2fsprogs xfsprogs btrfs-progs)", fstype)
	}
	const size = 400 << 20 // xfs wants 300 MiB
	var dev string
	if delay > 0 {
		dev = delayDevice(t, size, delay)
	} else {
		dev = loopDevice(t, size, "")
	}
	force := "-f"
	if fstype == "ext4" {
		force = "-F"
	}
	if out, err := exec.Command(mkfs, "-q", force, dev).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.%s: %v: %s", fstype, err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(dev, dir, fstype, 0, options); err != nil {
		t.Skipf("SKIP: this kernel mounts no %s: %v", fstype, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error("unmount: ", err)
		}
	})
	return dir
}

// needsFileHooks skips where the kernel can't track image files on fstype.
func needsFileHooks(t *testing.T, fstype string) {
	t.Helper()
	// What is not mounted may be a module that is not loaded.
	if err := bpf.CanTrackFiles(fstype); err != nil && os.Getenv("TIDEMARK_TESTVM") == "" {
		t.Skip("SKIP: `make vmtest-files` runs it under another kernel: ", err)
	}
}

// imageFile makes an image of size bytes in dir, full of data.
func imageFile(t *testing.T, dir string, size int64) string {
	t.Helper()
	file := filepath.Join(dir, "image.raw")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteString(strings.Repeat("tidemark", int(size/8))); err != nil {
		t.Fatal(err)
	}
	// Direct writers find no pages to collide with.
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	return file
}

// openFile tracks an image file.
func openFile(t *testing.T, o bpf.Options, file string) *cbt.Tracked {
	t.Helper()
	tr, err := bpf.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tr.Close() })
	s, err := cbt.OpenTracked(tr, file, bpf.DefaultGranuleShift)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// onEach runs a test on every file system whose files can be tracked.
func onEach(t *testing.T, f func(t *testing.T, fstype, dir string)) {
	for _, fstype := range fileSystems {
		t.Run(fstype, func(t *testing.T) {
			needsFileHooks(t, fstype)
			f(t, fstype, mountNew(t, fstype, 0, ""))
		})
	}
}

func describe(d cbt.Delta) string { return fmt.Sprintf("%v, unknown %v", d.Extents, d.Unknown) }

func addressOf(b *[4096]byte) uintptr { return uintptr(unsafe.Pointer(b)) }
