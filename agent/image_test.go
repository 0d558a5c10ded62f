package agent_test

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// newImageBench is a bench whose disk is an image file on a file system of its own.
func newImageBench(t *testing.T, fstype string) *bench {
	t.Helper()
	if err := bpf.CanTrackFiles(fstype); err != nil && os.Getenv("TIDEMARK_TESTVM") == "" {
		t.Skip("SKIP: `make vmtest-files` runs it under another kernel: ", err)
	}
	mkfs, err := exec.LookPath("mkfs." + fstype)
	if err != nil {
		t.Skipf("SKIP: no mkfs.%s (apt-get install e2fsprogs xfsprogs btrfs-progs)", fstype)
	}
	b := newBench(t)
	back := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(back, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(back, 400<<20); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--show", "-f", back).Output()
	if err != nil {
		t.Fatal("losetup: ", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev).Run() })
	if out, err := exec.Command(mkfs, "-q", dev).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", mkfs, err, out)
	}
	dir := t.TempDir()
	if err := unix.Mount(dev, dir, fstype, 0, ""); err != nil {
		t.Skipf("SKIP: this kernel mounts no %s: %v", fstype, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error("unmount: ", err)
		}
	})
	b.dev = filepath.Join(dir, "image.raw")
	if err := os.WriteFile(b.dev, make([]byte, diskSize), 0o600); err != nil {
		t.Fatal(err)
	}
	b.job.Disks = []string{b.dev}
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		b.job.PauseBudget = 5 * time.Second // emulated
	}
	return b
}

func TestImageFileIsTracked(t *testing.T) {
	for _, fstype := range bpf.FileSystems() {
		t.Run(fstype, func(t *testing.T) {
			b := newImageBench(t, fstype)
			b.wantContent(t, b.run(t).Point)
			b.write(t, 5<<20, []byte("changed"))
			r := b.run(t)
			b.wantContent(t, r.Point)
			if d := r.Point.Disks[0]; d.Tracking.Mode != "tracked" || d.Stats.Read > 1<<20 || !strings.Contains(string(d.Tracking.Evidence), cbt.MethodFile) {
				t.Errorf("%s, read %d, %v, %s", d.Tracking.Mode, d.Stats.Read, d.Tracking.Reasons, d.Tracking.Evidence)
			}
		})
	}
}

// mapped is a journal that is written through a mapping.
func mapped(t *testing.T, file string, stop <-chan struct{}) (done chan struct{}) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, diskSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	done = make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _, _ = unix.Munmap(mem), f.Close() }()
		for n := uint64(1); ; n++ {
			for _, off := range []int{int(n%slots) * slotSize, headAt} {
				binary.LittleEndian.PutUint64(mem[off:], n)
				if err := unix.Msync(mem[off:off+4096], unix.MS_SYNC); err != nil {
					t.Error(err)
					return
				}
			}
			select {
			case <-stop:
				return
			case <-time.After(recordEvery()):
			}
		}
	}()
	return done
}

func TestUnpausedWriterNeverTearsAnImage(t *testing.T) {
	for _, fstype := range bpf.FileSystems() {
		t.Run(fstype+" direct", func(t *testing.T) { neverTorn(t, newImageBench(t, fstype), journal) })
		t.Run(fstype+" mapped", func(t *testing.T) { neverTorn(t, newImageBench(t, fstype), mapped) })
	}
}
