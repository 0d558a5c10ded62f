package bpf

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sparseLoop attaches a sparse file of size bytes on tmpfs, which takes files of any size.
func sparseLoop(t *testing.T, size int64) Device {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: loop devices need root")
	}
	dir, err := os.MkdirTemp("/dev/shm", "tidemark-scale-")
	if err != nil {
		t.Skip("SKIP: no tmpfs at /dev/shm: ", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := filepath.Join(dir, "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--show", "-f", file).CombinedOutput()
	if err != nil {
		t.Skipf("SKIP: losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev).Run() })
	d, err := Lookup(dev)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func writeAt(t *testing.T, dev string, off int64) {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt([]byte("changed"), off); err != nil {
		t.Fatal(err)
	}
}

// 64 devices beside each other: each sees its own writes and no other's.
func TestSixtyFourDevices(t *testing.T) {
	tr := openTest(t, Options{})
	const n = 64
	regs := make([]*Registration, n)
	for i := range regs {
		var err error
		if regs[i], err = tr.Register(sparseLoop(t, 64<<20), DefaultGranuleShift); err != nil {
			t.Fatal(err)
		}
		if _, err := regs[i].Swap(); err != nil {
			t.Fatal(err)
		}
	}
	for i, r := range regs {
		writeAt(t, r.Device().Path, int64(i)<<16)
	}
	for i, r := range regs {
		e, err := r.Swap()
		if err != nil {
			t.Fatal(err)
		}
		if words := e.Bitmap(); e.Dirty() != 1 || words[i/64]>>(i%64)&1 != 1 || e.Taint() != 0 || e.Loss() != 0 {
			t.Errorf("device %d: %d granules marked, taint %v, loss %v", i, e.Dirty(), e.Taint().Reasons(), e.Loss().Reasons())
		}
	}
	if all, err := tr.Status(); err != nil || len(all) != n {
		t.Errorf("%d devices listed, %v", len(all), err)
	}
}

// A sparse disk of 16 TiB at both ends of the granule's range: its last byte is marked, and
// what that costs is what docs/limits.md says.
func TestSixteenTebibytes(t *testing.T) {
	tr := openTest(t, Options{})
	const disk = 16 << 40
	dev := sparseLoop(t, disk)
	for _, shift := range []uint{MinGranuleShift, DefaultGranuleShift, MaxGranuleShift} {
		t.Run(fmt.Sprintf("%dKiB", 1<<shift>>10), func(t *testing.T) {
			r, err := tr.Register(dev, shift)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := r.Unregister(); err != nil {
					t.Error(err)
				}
			}()
			writeAt(t, dev.Path, 0)
			writeAt(t, dev.Path, 7<<40)
			writeAt(t, dev.Path, disk-7)
			if err := r.Prepare(); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			e, err := r.Swap()
			if err != nil {
				t.Fatal(err)
			}
			swap := time.Since(begin)
			begin = time.Now()
			dirty := e.Dirty()
			read := time.Since(begin)
			if dirty != 3 || e.Taint() != 0 || e.Loss() != 0 {
				t.Errorf("%d granules marked, want 3; taint %v, loss %v", dirty, e.Taint().Reasons(), e.Loss().Reasons())
			}
			if want := int64(disk>>shift/8 + headerWords*8); int64(len(e.mem.words)*8) != want {
				t.Errorf("the bitmap takes %d bytes, want %d", len(e.mem.words)*8, want)
			}
			t.Logf("bitmap %.3g MiB per TiB; swap %v; reading the bits of 1 TiB %v", float64(len(e.mem.words)*8)/16/(1<<20), swap, read/16)
		})
	}
}
