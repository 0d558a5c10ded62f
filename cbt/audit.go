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
	dev, err := bpf.LookupTarget(path)
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
	s := &Tracked{tracker: tracker, reg: reg}
	return s, s.openFile(dev)
}

func unproven(path string, why []string) error {
	return fmt.Errorf("%s: %w: %s", path, ErrUnproven, strings.Join(why, "; "))
}

// Marks implements Auditor.
func (s *Tracked) Marks(since ChangeID) (Bitmap, Evidence, error) {
	if err := s.writeBack(0, 0); err != nil {
		return Bitmap{}, Evidence{}, err
	}
	current := s.reg.Current()
	epochs, why := s.since(since, current-1)
	live, err := s.reg.Live()
	if err != nil {
		return Bitmap{}, Evidence{}, err
	}
	bm := Bitmap{Words: live.Bitmap, Shift: s.reg.GranuleShift(), Size: s.reg.Size()}
	ev, err := s.evidence()
	if err != nil {
		return Bitmap{}, Evidence{}, err
	}
	for _, e := range epochs {
		why = append(why, judge(e)...)
		bm.Or(e.Bitmap())
		ev.add(e)
	}
	why = append(append(why, live.Taint.Reasons()...), live.Loss.Reasons()...)
	ev.addLive(live, current)
	ev.Missed = s.reg.Present(live.Missed)
	ev.Dirty = bm.count()
	if len(why) > 0 {
		return bm, ev, unproven(s.reg.Target().Label(), why)
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
	v.addMisses(live.Least)
}

// Marked implements Auditor.
func (s *Tracked) Marked(off, n int64) bool {
	if n <= 0 {
		return false
	}
	shift := s.reg.GranuleShift()
	first, last := uint64(off)>>shift, uint64(off+n-1)>>shift
	if s.reg.Marked(first, last) {
		return true
	}
	// A store through a mapping of an image file is marked when its page is written back. If
	// that fails, nothing can be said.
	return s.file != nil && (s.writeBack(off, n) != nil || s.reg.Marked(first, last))
}

// Distrust implements Auditor.
func (s *Tracked) Distrust() { s.reg.Taint(bpf.TaintAudit) }
