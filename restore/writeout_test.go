package restore_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
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

// pointDisk is a disk of a point with the content given.
func pointDisk(t *testing.T, content []byte) *restore.PointDisk {
	t.Helper()
	repo, _ := disktest.Repo(t)
	p := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon, Disks: [][]byte{content}})
	d, err := restore.OpenPoint(repo, p, 0, restore.NewCache(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func TestWriteToLeavesNothingOfADamagedDisk(t *testing.T) {
	damage := &store.CorruptError{Object: "pack", What: "hash differs"}
	content := disktest.Bytes(bytes.Repeat([]byte("x"), 9<<20))
	dir := t.TempDir()
	_, err := restore.WriteTo(t.Context(), brokenDisk{Bytes: content, from: 5 << 20, to: 5<<20 + 1, err: damage}, filepath.Join(dir, "disk.raw"), restore.WriteOptions{})
	if !errors.Is(err, restore.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// What an interrupted call has written is not written again, and what it has left wrong
// is mended.
func TestInterruptedRestoreGoesOn(t *testing.T) {
	content := disktest.Content(20<<20+512, 23)
	copy(content, disktest.Noise(4<<20, 23))
	for i := range 4 << 20 { // a hole, which the leftover below has filled
		content[8<<20+i] = 0
	}
	d := pointDisk(t, content)
	path := filepath.Join(t.TempDir(), "disk.raw")
	ctx, cancel := context.WithCancel(t.Context())
	_, err := restore.WriteTo(ctx, d, path, restore.WriteOptions{Workers: 1, Progress: func(int64, int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	onlyFile(t, restore.Partial(path))
	f, err := os.OpenFile(restore.Partial(path), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 9 << 20} {
		if _, err := f.WriteAt([]byte("garbage"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(30<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	r, err := restore.WriteTo(t.Context(), d, path, restore.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Resumed || r.Written == 0 || r.Written > r.Data-3<<20 {
		t.Errorf("result %+v: the first piece was there", r)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file differs, %v", err)
	}
	onlyFile(t, path)
}

func TestOneFileIsRestoredOnceAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	content := disktest.Bytes(bytes.Repeat([]byte("x"), 9<<20))
	var once sync.Once
	_, err := restore.WriteTo(t.Context(), content, path, restore.WriteOptions{Progress: func(int64, int64) {
		once.Do(func() {
			if _, err := restore.WriteTo(t.Context(), content, path, restore.WriteOptions{}); !errors.Is(err, restore.ErrBusy) {
				t.Errorf("a second restore to the same file: %v", err)
			}
		})
	}})
	if err != nil {
		t.Fatal(err)
	}
	onlyFile(t, path)
}

func TestInPlaceWritesOnlyWhatDiffers(t *testing.T) {
	const size = 12<<20 + 4096
	content := disktest.Content(size, 24)
	copy(content[2<<20:], make([]byte, 2<<20))
	d := pointDisk(t, content)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	for _, tt := range []struct {
		name   string
		change func(p []byte) []byte
		most   int64 // bytes written
	}{
		{"the same", func(p []byte) []byte { return p }, 0},
		{"one byte", func(p []byte) []byte { p[5<<20]++; return p }, 1<<20 + 64<<10},
		{"something where zeroes belong", func(p []byte) []byte { p[3<<20]++; return p }, 1<<20 + 64<<10},
		{"the head", func(p []byte) []byte { p[0]++; return p }, 64 << 10},
		{"shorter", func(p []byte) []byte { return p[:len(p)-8192] }, 1<<20 + 128<<10},
		{"longer", func(p []byte) []byte { return append(p, 1, 2, 3) }, 1<<20 + 128<<10},
		{"empty", func([]byte) []byte { return nil }, size},
	} {
		if err := os.WriteFile(path, tt.change(bytes.Clone(content)), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := restore.WriteTo(t.Context(), d, path, restore.WriteOptions{InPlace: true, ReadBack: true})
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if r.Written > tt.most || tt.most > 0 && r.Written == 0 || r.Data+r.Zero != size {
			t.Errorf("%s: %+v, want at most %d written", tt.name, r, tt.most)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: the file differs, %v", tt.name, err)
		}
		onlyFile(t, path)
	}
	// The hole is one again.
	st, err := os.Stat(path)
	if err != nil || st.Sys().(*syscall.Stat_t).Blocks*512 > size-1<<20 {
		t.Errorf("%v, %d blocks", err, st.Sys().(*syscall.Stat_t).Blocks)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := restore.WriteTo(t.Context(), d, path, restore.WriteOptions{InPlace: true}); !errors.Is(err, restore.ErrBusy) {
		t.Errorf("a file that is open elsewhere: %v", err)
	}
}

// A file that is changed in place does not look like a disk meanwhile.
func TestInPlaceWritesTheHeadLast(t *testing.T) {
	content := bytes.Repeat([]byte("x"), 9<<20)
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xdd}, len(content)), 0o600); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	d := brokenDisk{Bytes: content, from: 8 << 20, to: 8<<20 + 1, err: broken}
	if _, err := restore.WriteTo(t.Context(), d, path, restore.WriteOptions{InPlace: true, Workers: 1}); !errors.Is(err, broken) {
		t.Fatalf("got %v, want %v", err, broken)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got[:1<<20], make([]byte, 1<<20)) {
		t.Errorf("the first MiB is not zero after a restore that failed, %v", err)
	}
	if _, err := restore.WriteTo(t.Context(), disktest.Bytes(content), path, restore.WriteOptions{InPlace: true}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file differs, %v", err)
	}
}

// lyingDisk says that what it holds is something else each time.
type lyingDisk struct {
	disktest.Bytes
	reads *atomic.Int64
}

func (d lyingDisk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Bytes.ReadAt(p, off)
	if off == 4<<20 && n > 0 && d.reads.Add(1) > 1 {
		p[0]++
	}
	return n, err
}

func (d lyingDisk) ReadAtContext(_ context.Context, p []byte, off int64) (int, error) {
	return d.ReadAt(p, off)
}

func TestReadBackSeesWhatDiffers(t *testing.T) {
	d := lyingDisk{bytes.Repeat([]byte("x"), 9<<20), new(atomic.Int64)}
	dir := t.TempDir()
	var back int64
	_, err := restore.WriteTo(t.Context(), d, filepath.Join(dir, "disk.raw"), restore.WriteOptions{ReadBack: true, ReadingBack: func(done, _ int64) { back = done }})
	if !errors.Is(err, restore.ErrReadBack) || !strings.Contains(err.Error(), "bytes 4194304 to") || back == 0 {
		t.Errorf("got %v, after %d bytes", err, back)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	d.reads.Store(-10)
	if _, err := restore.WriteTo(t.Context(), d, filepath.Join(dir, "disk.raw"), restore.WriteOptions{ReadBack: true}); err != nil {
		t.Error(err)
	}
}

func TestDeviceIsComparedFirst(t *testing.T) {
	const size = 8 << 20
	content := disktest.Content(size, 25)
	dev := loopDevice(t, content)
	d := pointDisk(t, content)
	r, err := restore.WriteTo(t.Context(), d, dev, restore.WriteOptions{ReadBack: true})
	if err != nil || r.Written != 0 || !r.Device {
		t.Errorf("a device that is the disk already: %+v, %v", r, err)
	}
	r, err = restore.WriteTo(t.Context(), d, dev, restore.WriteOptions{Blind: true, ReadBack: true})
	if err != nil || r.Written < size-1<<20 {
		t.Errorf("blind: %+v, %v", r, err)
	}
	if got, err := os.ReadFile(dev); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the device differs, %v", err)
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
	content := bytes.Repeat([]byte("x"), 12<<20)
	dev := loopDevice(t, bytes.Repeat([]byte{0xdd}, len(content)))
	broken := errors.New("broken")
	d := brokenDisk{Bytes: content, from: 8 << 20, to: 8<<20 + 1, err: broken}
	if _, err := restore.WriteTo(t.Context(), d, dev, restore.WriteOptions{Workers: 1}); !errors.Is(err, broken) {
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
