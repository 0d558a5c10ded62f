package restore_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

func TestWriteToFile(t *testing.T) {
	for _, size := range []int{512, 70_001, 1 << 20, 5<<20 + 512} {
		content := disktest.Content(size, 20)
		path := filepath.Join(t.TempDir(), "disk.raw")
		var last, calls int64
		r, err := restore.WriteTo(t.Context(), disktest.Bytes(content), path, restore.WriteOptions{Progress: func(done, total int64) {
			if done < last || total != int64(size) {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last, calls = done, calls+1
		}})
		if err != nil {
			t.Fatal(err)
		}
		if r.Data+r.Zero != int64(size) || last != int64(size) || calls == 0 || r.Device {
			t.Errorf("result %+v, progress %d, for %d bytes", r, last, size)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			t.Errorf("file of %d bytes differs, %v", size, err)
		}
		onlyFile(t, path)
	}
}

func onlyFile(t *testing.T, path string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 || entries[0].Name() != filepath.Base(path) {
		t.Errorf("files: %v, %v", entries, err)
	}
}

func TestWriteToFileIsSparse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	r, err := restore.WriteTo(t.Context(), emptyDisk(1<<40), path, restore.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if r.Zero != 1<<40 || r.Data != 0 {
		t.Errorf("result %+v", r)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if blocks := st.Sys().(*syscall.Stat_t).Blocks; st.Size() != 1<<40 || blocks > 64 {
		t.Errorf("%d bytes in %d blocks", st.Size(), blocks)
	}
}

func TestWriteToRelativePath(t *testing.T) {
	t.Chdir(t.TempDir())
	if _, err := restore.WriteTo(t.Context(), emptyDisk(4096), "disk.raw", restore.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	onlyFile(t, "./disk.raw")
}

func TestWriteToFileReplacesOnlyByForce(t *testing.T) {
	content := disktest.Bytes(disktest.Content(100_000, 21))
	dir := t.TempDir()
	path, link := filepath.Join(dir, "disk.raw"), filepath.Join(t.TempDir(), "link")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := restore.WriteTo(t.Context(), content, path, restore.WriteOptions{}); !errors.Is(err, os.ErrExist) {
		t.Errorf("without force: %v, want %v", err, os.ErrExist)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "precious" {
		t.Errorf("without force the file became %q, %v", got, err)
	}
	if _, err := restore.WriteTo(t.Context(), content, link, restore.WriteOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Errorf("with force through a link: file differs, %v", err)
	}
	onlyFile(t, path)
}

func TestWriteToLeavesNothingWhenItFails(t *testing.T) {
	broken := errors.New("broken")
	content := disktest.Bytes(bytes.Repeat([]byte("x"), 5<<20))
	ctx, cancel := context.WithCancel(t.Context())
	cases := []struct {
		name string
		ctx  context.Context
		disk restore.Disk
		o    restore.WriteOptions
		want error
	}{
		{"broken disk", t.Context(), brokenDisk{Bytes: content, from: 3 << 20, to: 3<<20 + 1, err: broken}, restore.WriteOptions{}, broken},
		{"cancelled", ctx, content, restore.WriteOptions{Workers: 1, Progress: func(int64, int64) { cancel() }}, context.Canceled},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := restore.WriteTo(c.ctx, c.disk, filepath.Join(dir, "disk.raw"), c.o)
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("left behind: %v, %v", entries, err)
			}
		})
	}
}

func TestWriteToRefusesOddTargets(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{dir, "/dev/null", fifo, "", dir + "/new/"} {
		if _, err := restore.WriteTo(t.Context(), emptyDisk(4096), target, restore.WriteOptions{Force: true}); !errors.Is(err, restore.ErrTarget) {
			t.Errorf("%q: %v, want %v", target, err, restore.ErrTarget)
		}
	}
}

// loopDevice makes a loop device over a file with the given content.
func loopDevice(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: no loop device to be had here: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

func TestWriteToDevice(t *testing.T) {
	const size, more = 6<<20 + 512, 1 << 20
	old := bytes.Repeat([]byte{0xdd}, size+more)
	dev := loopDevice(t, old)
	content := disktest.Content(size, 22)
	r, err := restore.WriteTo(t.Context(), disktest.Bytes(content), dev, restore.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Device || r.Data+r.Zero != size || r.Zero == 0 {
		t.Errorf("result %+v", r)
	}
	got, err := os.ReadFile(dev)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:size], content) {
		t.Error("the device differs from the disk")
	}
	// A loop device is cut to whole sectors.
	if !bytes.Equal(got[size:], old[size:len(got)]) {
		t.Error("bytes behind the disk's end changed")
	}
}

func TestWriteToDeviceNeedsRoom(t *testing.T) {
	old := bytes.Repeat([]byte{0xdd}, 1<<20)
	dev := loopDevice(t, old)
	if _, err := restore.WriteTo(t.Context(), emptyDisk(1<<20+512), dev, restore.WriteOptions{}); !errors.Is(err, restore.ErrTooSmall) {
		t.Errorf("got %v, want %v", err, restore.ErrTooSmall)
	}
	if got, err := os.ReadFile(dev); err != nil || !bytes.Equal(got, old) {
		t.Errorf("the device was touched, %v", err)
	}
}

func TestWriteToDeviceInUse(t *testing.T) {
	dev := loopDevice(t, make([]byte, 1<<20))
	f, err := os.OpenFile(dev, os.O_RDONLY|syscall.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := restore.WriteTo(t.Context(), emptyDisk(4096), dev, restore.WriteOptions{}); !errors.Is(err, restore.ErrBusy) {
		t.Errorf("got %v, want %v", err, restore.ErrBusy)
	}
}

// A restore to a device that ends early must not look like a disk.
func TestWriteToDeviceWritesTheHeadLast(t *testing.T) {
	content := bytes.Repeat([]byte("x"), 4<<20)
	dev := loopDevice(t, bytes.Repeat([]byte{0xdd}, len(content)))
	broken := errors.New("broken")
	d := brokenDisk{Bytes: content, from: 3 << 20, to: 3<<20 + 1, err: broken}
	if _, err := restore.WriteTo(t.Context(), d, dev, restore.WriteOptions{}); !errors.Is(err, broken) {
		t.Fatalf("got %v, want %v", err, broken)
	}
	got, err := os.ReadFile(dev)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:1<<20], make([]byte, 1<<20)) {
		t.Error("the first MiB is not zero after a failed restore")
	}
}
