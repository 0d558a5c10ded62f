package bpf

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// Saved is what is left of a registration while the host is down: its closed epochs as one.
type Saved struct {
	ID           string // of the registration
	First, Last  uint64 // epochs
	Shift        uint   // of the granule
	Size         int64  // bytes
	Table        uint64
	Opened       time.Time
	Closed       time.Time
	Missed       Misses
	Sectors      uint64
	Landed       uint64
	Kernel       uint64
	KernelCounts bool
	Boot         string // in which it was saved, hex
	Trust        Trust
	Bitmap       []uint64
}

// Trust is why an epoch of an earlier boot is believed to hold all that was written since.
type Trust uint64

// Values of Trust.
const (
	SavedProven  Trust = 1 + iota // something outside of the tracker shows that nobody wrote
	SavedTrusted                  // the user said so
)

// Export is the union of the retained epochs, which must be gapless.
func (r *Registration) Export() (Saved, error) {
	if len(r.retained) == 0 {
		return Saved{}, errors.New("no epoch was closed")
	}
	boot, err := BootID()
	if err != nil {
		return Saved{}, err
	}
	first, last := r.retained[0], r.retained[len(r.retained)-1]
	s := Saved{
		ID: r.ID(), First: first.First(), Last: last.Last(), Shift: last.GranuleShift(), Size: last.Size(), Table: last.hdr(hdrTable),
		Opened: first.Opened(), Closed: last.Closed(), KernelCounts: true, Boot: boot, Bitmap: make([]uint64, len(last.Bitmap())),
	}
	next := s.First
	for _, e := range r.retained {
		if e.First() != next {
			return Saved{}, fmt.Errorf("epoch %d is missing", next)
		}
		next = e.Last() + 1
		for i, w := range e.Bitmap() {
			s.Bitmap[i] |= w
		}
		for i, n := range e.Missed() {
			s.Missed[i] += n
		}
		s.Sectors += e.Sectors()
		s.Landed += e.Landed()
		n, ok := e.KernelSectors()
		s.Kernel += n
		s.KernelCounts = s.KernelCounts && ok
	}
	return s, nil
}

// Restore goes on with a registration of an earlier boot: what was saved is its retained
// epoch. The caller must know that nobody wrote since, and ask Untouched afterwards.
func (t *Tracker) Restore(dev Device, s Saved) (*Registration, error) {
	if dev.Size != s.Size || uint64(len(s.Bitmap)) != (granules(s.Size, s.Shift)+63)/64 || s.First == 0 || s.Last < s.First || s.Last == ^uint64(0) {
		return nil, errors.New("what was saved does not fit the device")
	}
	return t.register(dev, s.Shift, &s)
}

// restore pins what was saved, and returns the number of the epoch after it.
func (r *Registration) restore(like shape, s *Saved) (uint64, error) {
	id, err := hex.DecodeString(s.ID)
	if err != nil || len(id) != 16 {
		return 0, fmt.Errorf("registration %q", s.ID)
	}
	boot, err := hex.DecodeString(s.Boot)
	if err != nil || len(boot) != 16 {
		return 0, fmt.Errorf("boot %q", s.Boot)
	}
	r.id = [2]uint64{binary.BigEndian.Uint64(id), binary.BigEndian.Uint64(id[8:])}
	e, err := newEpoch(like.granules)
	if err != nil {
		return 0, err
	}
	w := e.mem.words
	w[hdrMagic], w[hdrShift], w[hdrGranules] = headerMagic, uint64(like.shift), like.granules
	w[hdrSize], w[hdrDev], w[hdrStart] = uint64(like.size), r.what.id(), like.start
	w[hdrDiskSeq], w[hdrTable], w[hdrTracked] = like.diskSeq, like.table, like.tracked
	w[hdrID], w[hdrID+1], w[hdrInstance] = r.id[0], r.id[1], r.t.instance
	w[hdrFirst], w[hdrLast], w[hdrClosed] = s.First, s.Last, 1
	w[hdrOpenedAt], w[hdrClosedAt] = uint64(s.Opened.UnixNano()), uint64(s.Closed.UnixNano())
	w[hdrSectors], w[hdrLanded], w[hdrKernel] = s.Sectors, s.Landed, s.Kernel
	if s.KernelCounts {
		w[hdrCounting] = 1
	}
	w[hdrPrograms] = uint64(len(s.Missed))
	copy(w[hdrMissed:], s.Missed[:])
	w[hdrVouched] = ^uint64(0) // else it would not have been saved
	w[hdrSaved] = uint64(s.Trust)
	w[hdrSavedIn], w[hdrSavedIn+1] = binary.BigEndian.Uint64(boot), binary.BigEndian.Uint64(boot[8:])
	copy(e.Bitmap(), s.Bitmap)
	e.pin = filepath.Join(r.t.slotDir(r.slot), epochName(s.Last))
	if err := e.m.Pin(e.pin); err != nil {
		e.close()
		return 0, fmt.Errorf("pin the saved epoch: %w", err)
	}
	r.retained = []*Epoch{e}
	return s.Last + 1, nil
}

// Saved tells of an epoch that lasted since an earlier boot why it is believed, and which boot
// that was; 0 for any other.
func (e *Epoch) Saved() (Trust, string) {
	if e.hdr(hdrSaved) == 0 {
		return 0, ""
	}
	return Trust(e.hdr(hdrSaved)), fmt.Sprintf("%016x%016x", e.hdr(hdrSavedIn), e.hdr(hdrSavedIn+1))
}

// Untouched tells whether the kernel's own statistics know of no write since the device
// appeared; false also if they are turned off.
func (d Device) Untouched() bool {
	n, ok := d.kernelSectors()
	return ok && n == 0
}
