package cbt

import (
	"errors"
	"fmt"
	"strings"

	"github.com/tidemark/tidemark/bpf"
)

// ErrUnproven is wrapped when it can't be said what has not changed since an instant.
var ErrUnproven = errors.New("what has not changed since the last point can't be proven")

// Auditor lets what a Source says of a disk be checked against the disk itself. It
// holds the disk as a Source does, so that no epoch is swapped meanwhile, and closes
// no epoch.
type Auditor interface {
	// Marks are the granules that may have changed after the instant named since,
	// up to now. What is not marked has provably not changed: if that can't be
	// said, the error wraps ErrUnproven. The bitmap is the caller's.
	Marks(since ChangeID) (Bitmap, Evidence, error)

	// Marked tells whether a write to a part of [off, off+n) has been recorded since
	// the first call of Marks, in bytes. A mark stays. A write is marked before its data can be
	// read: what is read first and not marked then was not written. It is
	// safe for concurrent use, also beside Marks and Distrust, and cheap.
	Marked(off, n int64) bool

	// Distrust makes all that is said of the disk from now until its next restore
	// point unknown, with the reason that an audit found a change without a mark.
	Distrust()

	// Close lets go of the disk. Tracking goes on.
	Close() error
}

var _ Auditor = (*Tracked)(nil)

// Adopt takes hold of a device that is tracked already, and changes nothing. The error
// wraps ErrUnproven if it is not tracked, or not as it is now. All else as [OpenTracked].
func Adopt(tracker *bpf.Tracker, path string) (*Tracked, error) {
	dev, err := bpf.Lookup(path)
	if err != nil {
		return nil, err
	}
	reg, err := tracker.Acquire(dev)
	if errors.Is(err, bpf.ErrNotRegistered) || errors.Is(err, bpf.ErrDamaged) {
		return nil, fmt.Errorf("%w: %w", ErrUnproven, err)
	}
	if err != nil {
		return nil, err
	}
	if loss := reg.Changed(); loss != 0 {
		return nil, errors.Join(unproven(path, loss.Reasons()), reg.Close())
	}
	return &Tracked{tracker: tracker, reg: reg}, nil
}

func unproven(path string, why []string) error {
	return fmt.Errorf("%s: %w: %s", path, ErrUnproven, strings.Join(why, "; "))
}

// Marks implements Auditor.
func (s *Tracked) Marks(since ChangeID) (Bitmap, Evidence, error) {
	current := s.reg.Current()
	epochs, why := s.since(since, current-1)
	live, err := s.reg.Live()
	if err != nil {
		return Bitmap{}, Evidence{}, err
	}
	dev := s.reg.Device()
	bm := Bitmap{Words: live.Bitmap, Shift: s.reg.GranuleShift(), Size: dev.Size}
	ev := Evidence{
		Method: "ebpf", Device: dev.Number(), Granule: s.Granule(), Size: dev.Size, DiskSeq: dev.DiskSeq,
		Attached: s.tracker.Since(), LinkIDs: s.tracker.LinkIDs(), Programs: bpf.ProgramNames(),
	}
	if ev.BootID, err = s.tracker.BootID(); err != nil {
		return Bitmap{}, Evidence{}, err
	}
	for _, e := range epochs {
		why = append(why, judge(e)...)
		bm.Or(e.Bitmap())
		ev.add(e)
	}
	why = append(append(why, live.Taint.Reasons()...), live.Loss.Reasons()...)
	ev.addLive(live, current)
	ev.Missed = s.tracker.Attached(live.Missed)
	ev.Dirty = bm.count()
	if len(why) > 0 {
		return bm, ev, unproven(dev.Path, why)
	}
	return bm, ev, nil
}

// addLive adds the current epoch.
func (v *Evidence) addLive(live bpf.Live, number uint64) {
	switch {
	case !live.Counting:
		v.KernelSectors = nil
	case v.KernelSectors != nil:
		*v.KernelSectors += live.Kernel
	case v.FirstEpoch == 0:
		v.KernelSectors = &live.Kernel
	}
	if v.FirstEpoch == 0 {
		v.FirstEpoch = number
	}
	v.LastEpoch = number
	v.Sectors += live.Sectors
	v.Landed += live.Landed
	v.addMisses(live.Missed)
}

// Marked implements Auditor.
func (s *Tracked) Marked(off, n int64) bool {
	shift := s.reg.GranuleShift()
	return n > 0 && s.reg.Marked(uint64(off)>>shift, uint64(off+n-1)>>shift)
}

// Distrust implements Auditor.
func (s *Tracked) Distrust() { s.reg.Taint(bpf.TaintAudit) }
