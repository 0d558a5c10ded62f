package cbt_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// Whatever pin is gone, the next delta covers the disk and says why.
func TestUnknownAfterPinsAreGone(t *testing.T) {
	current := func(n string) string { return "dev-0/e000000000000000" + n }
	for _, c := range []struct{ pin, why string }{
		{"", "no tracker was attached"},
		{"gen-1", "no tracker was attached"},
		{"gen-1/meta", "interrupted"},
		{"gen-1/map-epochs", "map epochs is not pinned any more"},
		{"gen-1/map-devices", "map devices is not pinned any more"},
		{"gen-1/link-bio_queue_0", "program bio_queue_0 was detached"},
		{"dev-0", bpf.ErrDamaged.Error()},
		{current("2"), "the current epoch is not pinned any more"},
		{current("1"), "given up"},
	} {
		t.Run(filepath.Base(c.pin), func(t *testing.T) {
			dev, pins := loopDevice(t, small, ""), pinDir(t)
			s := open(t, bpf.Options{Dir: pins}, dev)
			first := changes(t, s, cbt.ChangeID{})
			_ = s.Close()
			write(t, dev, 1<<20)
			id := first.ID
			if c.pin == current("1") {
				// Epoch 1 is asked for again, as by a backup that failed.
				s = open(t, bpf.Options{Dir: pins}, dev)
				changes(t, s, id)
				_ = s.Close()
				c.pin = current("2")
			}
			if err := os.RemoveAll(filepath.Join(pins, c.pin)); err != nil {
				t.Fatal(err)
			}
			s = open(t, bpf.Options{Dir: pins}, dev)
			d := changes(t, s, id)
			wantUnknown(t, d, small, c.why)
			write(t, dev, 2<<20)
			if d = changes(t, s, d.ID); len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
				t.Errorf("after the new beginning: %v, unknown because %v", d.Extents, d.Unknown)
			}
		})
	}
}

// A backup under whose hands the pins are removed fails, or says that it was; it never
// harms what another process tracks in their place.
func TestPinsAreRemovedDuringABackup(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	held := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, held, cbt.ChangeID{}).ID
	if err := os.RemoveAll(pins); err != nil {
		t.Fatal(err)
	}
	write(t, dev, 1<<20)
	if d, err := held.Changes(t.Context(), id); err == nil && len(d.Unknown) == 0 {
		t.Errorf("believed without pins: %v", d.Extents)
	}
	s := open(t, bpf.Options{Dir: pins}, dev)
	newID := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	// The first one goes on, in a directory that is another's now.
	if d, err := held.Changes(t.Context(), id); err == nil && len(d.Unknown) == 0 {
		t.Errorf("believed with another's pins: %v", d.Extents)
	}
	if err := held.Untrack(); !errors.Is(err, bpf.ErrDetached) {
		t.Errorf("it untracks another's device: %v", err)
	}
	write(t, dev, 2<<20)
	s = open(t, bpf.Options{Dir: pins}, dev)
	if d := changes(t, s, newID); len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
		t.Errorf("the other: %v, unknown because %v", d.Extents, d.Unknown)
	}
}

func TestUnknownAfterBPFFSIsUnmounted(t *testing.T) {
	dev := loopDevice(t, small, "")
	mnt := t.TempDir()
	mount := func() {
		if err := unix.Mount("bpf", mnt, "bpf", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	mount()
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	pins := filepath.Join(mnt, "tidemark")
	held := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, held, cbt.ChangeID{}).ID
	if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	write(t, dev, 1<<20)
	if d, err := held.Changes(t.Context(), id); err == nil && len(d.Unknown) == 0 {
		t.Errorf("believed without pins: %v", d.Extents)
	}
	_ = held.Close()
	if _, err := bpf.Open(bpf.Options{Dir: pins}); err == nil {
		t.Error("a tracker was pinned in what is no bpffs")
	}
	mount()
	t.Cleanup(func() { _ = bpf.Remove(pins) })
	s := open(t, bpf.Options{Dir: pins}, dev)
	wantUnknown(t, changes(t, s, id), small, "no tracker was attached")
}

// What `tidemark untrack --all` does.
func TestRemoveDuringABackup(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	if err := bpf.Remove(pins); !errors.Is(err, bpf.ErrBusy) {
		t.Errorf("got %v, want %v", err, bpf.ErrBusy)
	}
	write(t, dev, 1<<20)
	if d := changes(t, s, id); len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
		t.Errorf("%v, unknown because %v", d.Extents, d.Unknown)
	}
	_ = s.Close()
	if err := bpf.Remove(pins); err != nil {
		t.Error(err)
	}
	s = open(t, bpf.Options{Dir: pins}, dev)
	wantUnknown(t, changes(t, s, id), small, "no tracker was attached")
}
