package cbt_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

const smallImage = 4 << 20

// Each way to change a file marks what it changed, and no more than its granules.
func TestFileChangesHoldWhatWasWritten(t *testing.T) {
	onEach(t, func(t *testing.T, fstype, dir string) {
		file := imageFile(t, dir, smallImage)
		pins := pinDir(t)
		s := openFile(t, bpf.Options{Dir: pins}, file)
		id := changes(t, s, cbt.ChangeID{}).ID
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		mem, err := unix.Mmap(int(f.Fd()), 0, smallImage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Munmap(mem) }()
		other := filepath.Join(dir, "other")
		if err := os.Link(file, other); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name string
			do   func() error
			want cbt.Extents
		}{
			{"nothing", func() error { return nil }, nil},
			{"write", func() error { _, err := f.WriteAt([]byte("x"), 1<<20-1); return err }, cbt.Extents{{Off: 1<<20 - 64<<10, Len: 64 << 10}}},
			{"store", func() error { mem[2<<20] = 1; return nil }, cbt.Extents{{Off: 2 << 20, Len: 64 << 10}}},
			{"store to the same page", func() error { mem[2<<20]++; return nil }, cbt.Extents{{Off: 2 << 20, Len: 64 << 10}}},
			{"by another name", func() error { write(t, other, 3<<20); return nil }, cbt.Extents{{Off: 3 << 20, Len: 64 << 10}}},
			{"punch", func() error {
				return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 64<<10, 64<<10)
			}, cbt.Extents{{Off: 64 << 10, Len: 64 << 10}}},
			{"down and up", func() error { return errors.Join(f.Truncate(smallImage-1), f.Truncate(smallImage)) }, cbt.Extents{{Off: smallImage - 64<<10, Len: 64 << 10}}},
		} {
			if err := c.do(); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			d := changes(t, s, id)
			if len(d.Unknown) > 0 || len(d.Extents) != len(c.want) || len(c.want) > 0 && d.Extents[0] != c.want[0] {
				t.Errorf("%s: got %s, want %v", c.name, describe(d), c.want)
			}
			if d.Evidence.Method != "ebpf-file" || d.Evidence.Inode == 0 || d.Evidence.FileSystem != fstype {
				t.Errorf("evidence %+v", d.Evidence)
			}
			id = d.ID
		}
		// The next process adopts what is pinned.
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		write(t, file, 0)
		s = openFile(t, bpf.Options{Dir: pins}, file)
		if d := changes(t, s, id); len(s.Began()) > 0 || len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
			t.Errorf("adopted: began %v, got %s", s.Began(), describe(d))
		}
	})
}

// What the programs can't account for makes the epoch unknown.
func TestFileUnknown(t *testing.T) {
	onEach(t, func(t *testing.T, fstype, dir string) {
		file := imageFile(t, dir, smallImage)
		pins := pinDir(t)
		s := openFile(t, bpf.Options{Dir: pins}, file)
		id := changes(t, s, cbt.ChangeID{}).ID

		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		// EXT4_IOC_CLEAR_ES_CACHE, XFS_IOC_FREE_EOFBLOCKS, BTRFS_IOC_DEFRAG: known to the file
		// system, and not to be known as harmless.
		request := map[string]uint{"ext4": 0x6628, "xfs": 0x8080583a, "btrfs": 0x50009402}[fstype]
		var arg [4096]byte
		arg[0] = 1
		_ = ioctl(f, request, &arg)
		_ = ioctl(f, 0x5401, &arg) // TCGETS, which isatty asks of every file
		_ = f.Close()
		d := changes(t, s, id)
		wantUnknown(t, d, smallImage, "ioctl")
		if f, err = os.Open(file); err != nil {
			t.Fatal(err)
		}
		_ = ioctl(f, 0x5401, &arg)
		_ = f.Close()
		if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
			t.Errorf("isatty makes it unknown: %v", d.Unknown)
		}

		// Without one of its links, nothing is believed.
		pinned, err := filepath.Glob(filepath.Join(pins, "gen-*", "files-"+fstype, "link-clean_1"))
		if err != nil || len(pinned) != 1 {
			t.Fatal(pinned, err)
		}
		if err := os.Remove(pinned[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Writes(); !errors.Is(err, bpf.ErrDetached) {
			t.Errorf("nobody wrote, says one that sees nothing: %v", err)
		}
		d = changes(t, s, d.ID)
		wantUnknown(t, d, smallImage, "detached")
		_ = s.Close()
		s = openFile(t, bpf.Options{Dir: pins}, file)
		if len(s.Began()) == 0 {
			t.Error("adopted without one of its programs")
		}
		d = changes(t, s, changes(t, s, cbt.ChangeID{}).ID)
		if len(d.Unknown) > 0 {
			t.Errorf("after the new beginning it is unknown still: %v", d.Unknown)
		}

		// Another file of the same size under the same name.
		id = d.ID
		copied := filepath.Join(dir, "copy")
		if out, err := exec.Command("cp", file, copied).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := os.Rename(copied, file); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Changes(t.Context(), id); !errors.Is(err, cbt.ErrDeviceChanged) {
			t.Errorf("replaced: got %v", err)
		}
		_ = s.Close()
		s = openFile(t, bpf.Options{Dir: pins}, file)
		d = changes(t, s, id)
		wantUnknown(t, d, smallImage, "had not begun")

		if err := os.Truncate(file, 2*smallImage); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Changes(t.Context(), d.ID); !errors.Is(err, cbt.ErrDeviceChanged) {
			t.Errorf("resized: got %v", err)
		}
		_ = s.Close()
		s = openFile(t, bpf.Options{Dir: pins}, file)
		wantUnknown(t, changes(t, s, d.ID), 2*smallImage, "resized")
	})
}

// An event is lost only if every copy of a program missed it.
func TestFileUnknownAfterMissedEvents(t *testing.T) {
	needsFileHooks(t, "ext4")
	file := imageFile(t, mountNew(t, "ext4", 0, ""), smallImage)
	extra := make([]uint64, 3)
	s := openFile(t, bpf.Options{Dir: pinDir(t), FileMisses: func(m []uint64) []uint64 {
		for i := range extra {
			m[i] += extra[i]
		}
		return m
	}}, file)
	id := changes(t, s, cbt.ChangeID{}).ID
	extra[0], extra[1] = 7, 7
	d := changes(t, s, id)
	if len(d.Unknown) > 0 {
		t.Errorf("two copies missed events, one did not: unknown because %v", d.Unknown)
	}
	extra[2]++
	extra[0]++
	extra[1]++
	d = changes(t, s, d.ID)
	wantUnknown(t, d, smallImage, "dropped tracing events")
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
		t.Errorf("the epoch after the loss is unknown too: %v", d.Unknown)
	}
}

// What happens to a file while its file system is not mounted is not seen.
func TestFileUnknownAfterUnmount(t *testing.T) {
	onEach(t, func(t *testing.T, fstype, dir string) {
		file := imageFile(t, dir, smallImage)
		pins := pinDir(t)
		s := openFile(t, bpf.Options{Dir: pins}, file)
		id := changes(t, s, cbt.ChangeID{}).ID
		_ = s.Close()
		dev := deviceOf(t, dir)
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(dev, dir, fstype, 0, ""); err != nil {
			t.Fatal(err)
		}
		s = openFile(t, bpf.Options{Dir: pins}, file)
		d := changes(t, s, id)
		if len(s.Began()) == 0 { // btrfs has another number each time
			wantUnknown(t, d, smallImage, "unmounted")
		} else {
			wantUnknown(t, d, smallImage, "had not begun")
		}
		if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
			t.Errorf("the next epoch is unknown too: %v", d.Unknown)
		}
	})
}

func deviceOf(t *testing.T, dir string) string {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[1] == dir {
			return f[0]
		}
	}
	t.Fatal("not mounted: ", dir)
	return ""
}

func ioctl(f *os.File, request uint, arg *[4096]byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), addressOf(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// Exchanging extents changes both files, whoever is asked to do it.
func TestFileUnknownAfterExchange(t *testing.T) {
	xfsIO, err := exec.LookPath("xfs_io")
	if err != nil {
		t.Skip("SKIP: no xfs_io (apt-get install xfsprogs)")
	}
	needsFileHooks(t, "xfs")
	dir := mountNew(t, "xfs", 0, "")
	file := imageFile(t, dir, smallImage)
	donor := filepath.Join(dir, "donor")
	if err := os.WriteFile(donor, make([]byte, smallImage), 0o600); err != nil {
		t.Fatal(err)
	}
	s := openFile(t, bpf.Options{Dir: pinDir(t)}, file)
	id := changes(t, s, cbt.ChangeID{}).ID
	unix.Sync()
	if out, err := exec.Command(xfsIO, "-c", "swapext "+file, donor).CombinedOutput(); err != nil || len(out) > 0 {
		t.Skipf("SKIP: swapext: %v: %s", err, out)
	}
	wantUnknown(t, changes(t, s, id), smallImage, "ioctl")
}

// Files whose writes can't all be seen are refused by name.
func TestFileRefused(t *testing.T) {
	refused := func(file, why string) {
		t.Helper()
		if _, err := bpf.LookupFile(file); !errors.Is(err, bpf.ErrUntrackable) || !strings.Contains(err.Error(), why) {
			t.Errorf("got %v, want %q", err, why)
		}
	}
	shm := filepath.Join("/dev/shm", filepath.Base(t.TempDir())+t.Name())
	if err := os.WriteFile(shm, make([]byte, 4096), 0o600); err == nil {
		defer func() { _ = os.Remove(shm) }()
		refused(shm, "can't be tracked, those on ext4, xfs and btrfs can")
	}
	refused(imageFile(t, mountNew(t, "ext4", 0, "data=journal"), smallImage), "data=journal")
	dir := mountNew(t, "ext4", 0, "")
	refused(dir, "not a regular file")
	file := imageFile(t, dir, smallImage)
	if out, err := exec.Command("chattr", "+j", file).CombinedOutput(); err != nil {
		t.Logf("SKIP: chattr: %v: %s", err, out)
	} else {
		refused(file, "chattr +j")
	}
}
