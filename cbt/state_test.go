package cbt_test

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// host is a host that can be started anew: only the disk and the state stay.
type host struct {
	pins string
	boot string
	cbt.State
}

func newHost(t *testing.T) *host {
	h := &host{pins: pinDir(t), boot: strings.Repeat("1", 32)}
	h.State = cbt.State{Dir: filepath.Join(t.TempDir(), "state"), Boot: func() (string, error) { return h.boot, nil }, Wtmp: filepath.Join(t.TempDir(), "wtmp")}
	return h
}

func (h *host) reboot(t *testing.T, dev string) {
	t.Helper()
	if err := bpf.Remove(h.pins); err != nil {
		t.Fatal(err)
	}
	h.boot = strings.Map(func(r rune) rune { return r + 1 }, h.boot)
	if out, err := exec.Command("blockdev", "--setrw", dev).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func (h *host) tracker(t *testing.T) *bpf.Tracker {
	t.Helper()
	tr, err := bpf.Open(bpf.Options{Dir: h.pins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tr.Close() })
	return tr
}

func (h *host) track(t *testing.T, dev string) *cbt.Tracked {
	t.Helper()
	s, err := h.Open(h.tracker(t), dev, bpf.DefaultGranuleShift)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func (h *host) save(t *testing.T, dev string) {
	t.Helper()
	if err := h.Save(h.tracker(t), dev); err != nil {
		t.Fatal(err)
	}
}

func (h *host) states(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(h.Dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// begin tracks the device and takes a first delta.
func (h *host) begin(t *testing.T, dev string) cbt.ChangeID {
	t.Helper()
	s := h.track(t, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	return id
}

// provenDevice is a loop device whose file tells when it was written to.
func provenDevice(t *testing.T) string {
	t.Helper()
	path := loopDevice(t, small, "")
	dev, err := bpf.Lookup(path)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := dev.Identity(); err != nil || id.Proof == "" {
		t.Skipf("SKIP: %s is not on ext4 or xfs (TMPDIR), or lacks what it takes: %v; TestReboot runs it in a guest", id.Name, err)
	}
	return path
}

func TestStateIsUsedOnceAfterACleanReboot(t *testing.T) {
	dev, h := provenDevice(t), newHost(t)
	id := h.begin(t, dev)
	write(t, dev, 1<<20)
	s := h.track(t, dev)
	changes(t, s, id) // an epoch that stays retained
	_ = s.Close()
	write(t, dev, 3<<20)
	h.save(t, dev)
	if f, err := os.OpenFile(dev, os.O_RDWR, 0); err == nil {
		if _, err := f.WriteAt(make([]byte, 512), 0); err == nil && f.Sync() == nil {
			t.Error("the device can be written to after its state was saved")
		}
		_ = f.Close()
	}
	file := h.states(t)
	if len(file) != 2 || file[1] != file[0]+".readonly" {
		t.Fatal(file)
	}
	copied, err := os.ReadFile(file[0])
	if err != nil {
		t.Fatal(err)
	}
	h.reboot(t, dev)

	s = h.track(t, dev)
	if why := s.Began(); len(why) > 0 {
		t.Errorf("begun anew: %v", why)
	}
	if left := h.states(t); len(left) > 0 {
		t.Errorf("the state is still there: %v", left)
	}
	write(t, dev, 5<<20)
	d := changes(t, s, id)
	want := cbt.Extents{{Off: 1 << 20, Len: 64 << 10}, {Off: 3 << 20, Len: 64 << 10}, {Off: 5 << 20, Len: 64 << 10}}
	if len(d.Unknown) > 0 || !slices.Equal(d.Extents, want) {
		t.Errorf("got %v, unknown because %v", d.Extents, d.Unknown)
	}
	if !strings.Contains(d.Evidence.SavedState, strings.Repeat("1", 32)) {
		t.Errorf("the evidence says %q of the saved state", d.Evidence.SavedState)
	}
	// The first instant can be asked for again, and a later one is not held up by it.
	if d2 := changes(t, s, d.ID); len(d2.Unknown) > 0 || len(d2.Extents) > 0 || d2.Evidence.SavedState != "" {
		t.Errorf("the next delta: %v, unknown because %v, %q", d2.Extents, d2.Unknown, d2.Evidence.SavedState)
	}
	_ = s.Close()

	// Somebody puts the file back.
	h.reboot(t, dev)
	if err := os.WriteFile(file[0], copied, 0o600); err != nil {
		t.Fatal(err)
	}
	wantUnknown(t, changes(t, h.track(t, dev), d.ID), small, "the device was written to since")
}

// A process that dies while it saves leaves a device that can't be written to, and the next
// one undoes that.
func TestSavingIsKilled(t *testing.T) {
	dev, h := loopDevice(t, small, ""), newHost(t)
	id := h.begin(t, dev)
	h.save(t, dev)
	if err := os.Remove(h.states(t)[0]); err != nil { // as if it had not come so far
		t.Fatal(err)
	}
	s := h.track(t, dev)
	write(t, dev, 1<<20)
	if d := changes(t, s, id); len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
		t.Errorf("%v, unknown because %v", d.Extents, d.Unknown)
	}
	if left := h.states(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestStateIsDroppedWhenTheDeviceIsUsedAgain(t *testing.T) {
	dev, h := loopDevice(t, small, ""), newHost(t)
	id := h.begin(t, dev)
	write(t, dev, 1<<20)
	h.save(t, dev)
	s := h.track(t, dev)
	if left := h.states(t); len(left) > 0 {
		t.Errorf("the state is still there: %v", left)
	}
	write(t, dev, 2<<20) // fails if it is read-only still
	if d := changes(t, s, id); len(d.Unknown) > 0 || d.Extents.Bytes() != 128<<10 {
		t.Errorf("%v, unknown because %v", d.Extents, d.Unknown)
	}
	id = changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	h.reboot(t, dev) // without saving
	s = h.track(t, dev)
	wantUnknown(t, changes(t, s, id), small, "no tracker was attached")
	_ = s.Close()

	h.save(t, dev)
	if err := h.Forget(dev); err != nil {
		t.Fatal(err)
	}
	if left := h.states(t); len(left) > 0 {
		t.Errorf("the state is still there: %v", left)
	}
	write(t, dev, 3<<20)
}

// All tracking is ended after it was saved: no state stays, not even of a device that is not there any more,
// and none is read-only. What is not Tidemark's stays.
func TestForgetAllStates(t *testing.T) {
	dev, gone, h := loopDevice(t, small, ""), loopDevice(t, small, ""), newHost(t)
	if err := h.ForgetAll(); err != nil {
		t.Errorf("nothing was ever saved: %v", err)
	}
	for _, d := range []string{dev, gone} {
		h.begin(t, d)
		h.save(t, d)
	}
	if len(h.states(t)) != 4 {
		t.Fatalf("saved are %v", h.states(t))
	}
	runTool(t, "blockdev", "--setrw", gone)
	runTool(t, "losetup", "-d", gone)
	other := filepath.Join(h.Dir, "notes")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := bpf.Remove(h.pins); err != nil {
		t.Fatal(err)
	}
	if err := h.ForgetAll(); err != nil {
		t.Fatal(err)
	}
	if left := h.states(t); len(left) != 1 || left[0] != other {
		t.Errorf("what is left: %v", left)
	}
	write(t, dev, 3<<20) // or fails, if it is read-only
}

// What the times of the loop device's file can't miss.
func TestStateIsRefusedAfterAWriteInBetween(t *testing.T) {
	for name, do := range map[string]func(t *testing.T, dev, file string){
		"loop":   func(t *testing.T, dev, _ string) { write(t, dev, 2<<20) },
		"direct": func(t *testing.T, dev, _ string) { writeDirect(t, dev, 2<<20) },
		"discard": func(t *testing.T, dev, _ string) {
			runTool(t, "blkdiscard", "-o", "1048576", "-l", "65536", dev)
		},
		"zeroes": func(t *testing.T, dev, _ string) {
			runTool(t, "blkdiscard", "-z", "-o", "1048576", "-l", "65536", dev)
		},
		"directio loop": func(t *testing.T, dev, _ string) {
			runTool(t, "losetup", "--direct-io=on", dev)
			writeDirect(t, dev, 2<<20)
		},
		"the file": func(t *testing.T, _, file string) { write(t, file, 2<<20) },
		"the file, with its time put back": func(t *testing.T, _, file string) {
			st, err := os.Stat(file)
			if err != nil {
				t.Fatal(err)
			}
			write(t, file, 2<<20)
			if err := os.Chtimes(file, st.ModTime(), st.ModTime()); err != nil {
				t.Fatal(err)
			}
		},
		"a mapping of the file": func(t *testing.T, _, file string) {
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			m, err := syscall.Mmap(int(f.Fd()), 2<<20, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			m[7]++
			if err := syscall.Munmap(m); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dev, h := provenDevice(t), newHost(t)
			id := h.begin(t, dev)
			h.save(t, dev)
			h.reboot(t, dev)
			b, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/loop/backing_file")
			if err != nil {
				t.Fatal(err)
			}
			do(t, dev, strings.TrimSpace(string(b)))
			h.Trust = true // does not help
			wantUnknown(t, changes(t, h.track(t, dev), id), small, "the device was written to since")
		})
	}
}

func writeDirect(t *testing.T, dev string, off int64) {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt(aligned(4096), off); err != nil {
		t.Fatal(err)
	}
}

func runTool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

func TestStateIsRefusedForOtherReasons(t *testing.T) {
	for _, c := range []struct {
		name, why string
		do        func(t *testing.T, h *host)
	}{
		{"damaged", "damaged or of another version", func(t *testing.T, h *host) {
			f := h.states(t)[0]
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(f, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"two starts", "started 2 times", func(t *testing.T, h *host) {
			var r [384]byte
			binary.LittleEndian.PutUint16(r[:], 2)
			binary.LittleEndian.PutUint32(r[340:], uint32(time.Now().Unix()+5))
			if err := os.WriteFile(h.Wtmp, append(r[:], r[:]...), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"gone", "no tracker was attached", func(t *testing.T, h *host) {
			if err := os.Remove(h.states(t)[0]); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dev, h := provenDevice(t), newHost(t)
			id := h.begin(t, dev)
			h.save(t, dev)
			h.reboot(t, dev)
			c.do(t, h)
			s := h.track(t, dev)
			wantUnknown(t, changes(t, s, id), small, c.why)
			if left := h.states(t); len(left) > 0 {
				t.Errorf("the state is still there: %v", left)
			}
		})
	}
}

// While anybody could write, nothing is saved, and the device stays as it was.
func TestStateIsNotSaved(t *testing.T) {
	dev, h := loopDevice(t, small, ""), newHost(t)
	id := h.begin(t, dev)
	refused := func(why string) {
		t.Helper()
		if err := h.Save(h.tracker(t), dev); !errors.Is(err, cbt.ErrNotSaved) || !strings.Contains(err.Error(), why) {
			t.Errorf("got %v, want %q", err, why)
		}
		if left := h.states(t); len(left) > 0 {
			t.Errorf("there is a state: %v", left)
		}
		write(t, dev, 1<<20)
	}
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	refused("open for writing in")
	m, err := syscall.Mmap(int(f.Fd()), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	refused("open for writing in")
	_ = syscall.Munmap(m)

	mnt := t.TempDir()
	runTool(t, "mkfs.ext4", "-q", dev)
	if err := unix.Mount(dev, mnt, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	refused("mounted")
	if err := unix.Unmount(mnt, 0); err != nil {
		t.Fatal(err)
	}
	above, err := exec.Command("losetup", "-f", "--show", dev).Output()
	if err != nil {
		t.Fatal(err)
	}
	refused("loop")
	runTool(t, "losetup", "-d", strings.TrimSpace(string(above)))

	held := h.track(t, dev)
	refused(bpf.ErrBusy.Error())
	_ = held.Close()

	dir := h.Dir
	h.Dir = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(h.Dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("not a directory")
	h.Dir = dir
	if d := changes(t, h.track(t, dev), id); len(d.Unknown) > 0 {
		t.Errorf("unknown because %v", d.Unknown)
	}
}

// Without a name that stays there is nothing to save: zram is another disk at each boot.
func TestStateNeedsAName(t *testing.T) {
	dev, h := trackedZram(t, small), newHost(t)
	h.begin(t, dev)
	if err := h.Save(h.tracker(t), dev); !errors.Is(err, bpf.ErrNoIdentity) {
		t.Errorf("got %v", err)
	}
}
