package cbt_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// loopDevice attaches a new file of size bytes, with partitions if table is
// an sfdisk script.
func loopDevice(t *testing.T, size int64, table string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: loop devices need root")
	}
	for _, tool := range []string{"losetup", "sfdisk", "fio", "blkdiscard", "partx"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIP: no %s (apt-get install util-linux fdisk fio)", tool)
		}
	}
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	if table != "" {
		c := exec.Command("sfdisk", "-q", file)
		c.Stdin = strings.NewReader(table)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("sfdisk: %v: %s", err, out)
		}
	}
	out, err := exec.Command("losetup", "--show", "-f", file).Output()
	if err != nil {
		t.Skipf("SKIP: losetup: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev).Run() })
	if table != "" {
		// Not --partscan: kernels without a partition parser take them from partx.
		if out, err := exec.Command("partx", "-a", dev).CombinedOutput(); err != nil {
			t.Fatalf("partx: %v: %s", err, out)
		}
		t.Cleanup(func() { _ = exec.Command("partx", "-d", dev).Run() })
	}
	return dev
}

// zramDevice gives a zram device that nobody uses a size until the test ends.
func zramDevice(t *testing.T, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: zram needs root")
	}
	sizes, err := filepath.Glob("/sys/block/zram*/disksize")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range sizes {
		if b, err := os.ReadFile(f); err != nil || strings.TrimSpace(string(b)) != "0" {
			continue
		}
		if err := os.WriteFile(f, fmt.Append(nil, size), 0); err != nil {
			continue
		}
		dir := filepath.Dir(f)
		t.Cleanup(func() {
			if err := os.WriteFile(filepath.Join(dir, "reset"), []byte("1"), 0); err != nil {
				t.Error(err)
			}
		})
		return filepath.Join("/dev", filepath.Base(dir))
	}
	const control = "/sys/class/zram-control/"
	b, err := os.ReadFile(control + "hot_add")
	if err != nil {
		t.Skip("SKIP: this kernel has no zram: bio-based devices are not tested here: ", err)
	}
	n := strings.TrimSpace(string(b))
	t.Cleanup(func() {
		if err := os.WriteFile(control+"hot_remove", []byte(n), 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile("/sys/block/zram"+n+"/disksize", fmt.Append(nil, size), 0); err != nil {
		t.Fatal(err)
	}
	return "/dev/zram" + n
}

// trackedZram is zramDevice, or skips where the tracker refuses it.
func trackedZram(t *testing.T, size int64) string {
	t.Helper()
	if why := rwPage(); why != "" {
		t.Skip("SKIP: zram is not tracked on this kernel: ", why)
	}
	return zramDevice(t, size)
}

func pinDir(t *testing.T) string {
	dir := filepath.Join(filepath.Dir(bpf.DefaultDir), fmt.Sprintf("tidemark-test-%d-%s", os.Getpid(), strings.NewReplacer("/", "-", ".", "-").Replace(t.Name())))
	t.Cleanup(func() {
		if err := bpf.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// replica is a copy of a device that is kept in step by the deltas alone. Like
// a backup it is killed at any moment: the change ID is saved after the data.
type replica struct {
	dir     string
	dev     string
	tracker *bpf.Tracker
	src     cbt.Source
	id      cbt.ChangeID

	buffered bool // read through the page cache
}

// openReplica has a tracker that may miss events without being replaced.
func openReplica(dir, pins, dev string) (*replica, func(), error) {
	return openReplicaWith(bpf.Options{Dir: pins, Copies: 3}, bpf.DefaultGranuleShift, dir, dev)
}

func openReplicaWith(o bpf.Options, shift uint, dir, dev string) (*replica, func(), error) {
	tr, err := bpf.Open(o)
	if err != nil {
		return nil, nil, err
	}
	src, err := cbt.OpenTracked(tr, dev, shift)
	if err != nil {
		_ = tr.Close()
		return nil, nil, err
	}
	r := &replica{dir: dir, dev: dev, tracker: tr, src: src}
	b, err := os.ReadFile(filepath.Join(dir, "id"))
	if err == nil {
		r.id, err = cbt.ParseChangeID(string(b))
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return r, func() { _ = src.Close(); _ = tr.Close() }, err
}

// step takes over what changed and returns the delta.
func (r *replica) step(ctx context.Context) (cbt.Delta, error) {
	d, err := r.src.Changes(ctx, r.id)
	if err != nil {
		return d, err
	}
	flags := os.O_RDONLY | syscall.O_DIRECT
	if r.buffered {
		flags = os.O_RDONLY
	}
	in, err := os.OpenFile(r.dev, flags, 0)
	if err != nil {
		return d, err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(filepath.Join(r.dir, "replica"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return d, err
	}
	defer func() { _ = out.Close() }()
	buf := aligned(1 << 20)
	defer func() { _ = syscall.Munmap(buf) }()
	for _, x := range d.Extents {
		for off, end := x.Off, x.Off+x.Len; off < end; {
			n := min(int64(len(buf)), end-off)
			if _, err := in.ReadAt(buf[:n], off); err != nil {
				return d, err
			}
			if _, err := out.WriteAt(buf[:n], off); err != nil {
				return d, err
			}
			off += n
		}
	}
	tmp := filepath.Join(r.dir, "id.new")
	if err := os.WriteFile(tmp, []byte(d.ID.String()), 0o600); err != nil {
		return d, err
	}
	if err := os.Rename(tmp, filepath.Join(r.dir, "id")); err != nil {
		return d, err
	}
	r.id = d.ID
	return d, r.src.Commit(d.ID)
}

func aligned(n int) []byte {
	mem, err := syscall.Mmap(-1, 0, n, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return mem
}

// differing compares replica and device, and returns where granules of that many
// bytes differ.
func differing(t *testing.T, dir, dev string, granule int) []int64 {
	t.Helper()
	// A partition and its disk have page caches of their own: past them.
	a, err := os.OpenFile(dev, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = a.Close() }()
	b, err := os.Open(filepath.Join(dir, "replica"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }()
	x, y := aligned(granule), make([]byte, granule)
	defer func() { _ = syscall.Munmap(x) }()
	var bad []int64
	for off := int64(0); ; off += int64(len(x)) {
		n, err := io.ReadFull(a, x)
		m, _ := io.ReadFull(b, y)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			bad = append(bad, off)
		}
		if err != nil {
			return bad
		}
	}
}
