package bpf

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// Programs that were closed, or never complete, vouch for nothing.
func TestClosedFileHooksVouchForNothing(t *testing.T) {
	h := &fileHooks{hooks: fileSystems["ext4"].hooks}
	h.close()
	if h.intact() {
		t.Error("closed, and intact")
	}
	if m, err := h.missed(); !errors.Is(err, ErrDetached) {
		t.Errorf("missed %v, %v", m, err)
	}
}

func TestHooksChanged(t *testing.T) {
	tr := &Tracker{hostMap: &mapping{words: make([]uint64, hostWords)}}
	before := tr.hookChanges()
	if hooksChanged(before, tr.hookChanges()) {
		t.Error("nothing has changed")
	}
	tr.beginHookChange()
	during := tr.hookChanges()
	if !hooksChanged(before, during) || !hooksChanged(during, tr.hookChanges()) {
		t.Error("an epoch that lies in the change is believed")
	}
	tr.beginHookChange() // after a process that died
	if !hooksChanged(during, tr.hookChanges()) {
		t.Error("two changes look like one")
	}
	tr.endHookChange()
	tr.endHookChange()
	after := tr.hookChanges()
	if !hooksChanged(before, after) || !hooksChanged(during, after) || hooksChanged(after, tr.hookChanges()) {
		t.Errorf("before %d, during %d, after %d", before, during, after)
	}
}

// A process that died while it attached or detached leaves the count odd: the next one ends that.
func TestOpenEndsAHookChange(t *testing.T) {
	first := openTest(t, Options{})
	first.beginHookChange()
	second, err := Open(Options{Dir: first.dir, AdoptOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = second.Close() }()
	if n := first.hookChanges(); n != 2 {
		t.Errorf("the count is %d", n)
	}
}

// fakeFile makes tr believe that it tracks an image file, of which it has no programs.
func fakeFile(t *testing.T, tr *Tracker, fs uint32) (slotDir string) {
	t.Helper()
	spec, err := loadFiles()
	if err != nil {
		t.Fatal(err)
	}
	if tr.files, err = ebpf.NewMap(spec.Maps["files"]); err != nil {
		t.Fatal(err)
	}
	if err := tr.files.Pin(tr.filesPin()); err != nil {
		t.Fatal(err)
	}
	slot, err := tr.freeSlot()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(tr.slotDir(slot), 0o700); err != nil {
		t.Fatal(err)
	}
	f := inode{filesFileKey{Dev: 0xffff00ff, Ino: 12345}, filesImage{Slot: slot, GranuleShift: 16, Granules: 64, Fs: fs}}
	r := &Registration{t: tr, what: f, programs: blockPrograms{tr}, slot: slot, id: [2]uint64{1, 2}}
	e, err := r.begin(shape{n: 1, granules: 64, shift: 16, size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer e.close()
	if err := tr.maps.Epochs.Put(slot, e.m); err != nil {
		t.Fatal(err)
	}
	if err := f.insert(tr, slot, 16); err != nil {
		t.Fatal(err)
	}
	return tr.slotDir(slot)
}

// A file that an upgrade can't take over is named with the reason, and nothing of it stays behind.
func TestUpgradeNamesTheFilesItDrops(t *testing.T) {
	if !CanUpgrade() {
		t.Skip("SKIP: on this kernel programs are not replaced")
	}
	for name, fs := range map[string]uint32{"without its programs": fileSystems["ext4"].number, "of a later version": 99} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			tr := openTest(t, Options{})
			dir := fakeFile(t, tr, fs)
			_ = tr.Close()
			next, err := Open(Options{Dir: tr.dir, Variant: 1})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = next.Close() }()
			if next.Outdated() != "" || !strings.Contains(next.Began(), "/12345 was not taken over by an upgrade: ") {
				t.Errorf("outdated %q, began %q", next.Outdated(), next.Began())
			}
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("its epochs stay: %v", err)
			}
			if all, err := next.Status(); err != nil || len(all) != 0 {
				t.Errorf("status %+v, %v", all, err)
			}
			if gens, err := filepath.Glob(filepath.Join(tr.dir, "gen-*")); err != nil || len(gens) != 1 {
				t.Errorf("generations %v, %v", gens, err)
			}
		})
	}
}

// The last registration that is closed lets go of the programs, so that others can see them detached.
func TestFileHooksAreHeldByRegistrations(t *testing.T) {
	h := &fileHooks{ids: []uint32{1}}
	a, b := &Registration{programs: h}, &Registration{programs: h}
	tr := &Tracker{open: map[*Registration]struct{}{a: {}, b: {}}, fileHooks: map[string]*fileHooks{"ext4": h}}
	delete(tr.open, a)
	if tr.letGo(h); tr.fileHooks["ext4"] != h || h.ids == nil {
		t.Error("the other one needs it")
	}
	delete(tr.open, b)
	if tr.letGo(h); len(tr.fileHooks) != 0 || h.ids != nil {
		t.Error("held still")
	}
}
