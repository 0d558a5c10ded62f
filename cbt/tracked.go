package cbt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
)

// ErrDeviceChanged is wrapped when the device was replaced or resized while it was
// in use. Nothing that was read from it may be kept.
var ErrDeviceChanged = errors.New("the device changed while it was in use")

// Tracked is a Source over the eBPF tracker.
type Tracked struct {
	tracker *bpf.Tracker
	reg     *bpf.Registration
	began   []string // why this registration is new, if it is
	file    *os.File // the image file, nil for devices
	resumed bool     // from a saved state
}

var _ Source = (*Tracked)(nil)

// OpenTracked takes hold of the tracking of the block device or image file at path, and starts it with
// granules of 1<<shift bytes if there is none that can be believed. The
// tracker stays the caller's. Hold the device open meanwhile, so that it can't be
// replaced. Errors wrap those of package bpf.
func OpenTracked(tracker *bpf.Tracker, path string, shift uint) (*Tracked, error) {
	return State{}.Open(tracker, path, shift)
}

// Open is OpenTracked, but where tracking would begin anew it goes on with the saved state of the
// last boot, if that can be believed. Either way the saved state is gone then.
func (v State) Open(tracker *bpf.Tracker, path string, shift uint) (*Tracked, error) {
	what, err := bpf.LookupTarget(path)
	if err != nil {
		return nil, err
	}
	s := &Tracked{tracker: tracker}
	if err := v.acquire(s, what, shift); err != nil {
		return nil, err
	}
	if err := s.openFile(what); err != nil {
		return nil, err
	}
	return s, nil
}

// openFile opens an image file, to write back what is in the page cache. If that fails, s is closed.
func (s *Tracked) openFile(what bpf.Target) error {
	if _, ok := what.(bpf.File); !ok {
		return nil
	}
	var err error
	if s.file, err = os.Open(what.Label()); err != nil {
		return errors.Join(err, s.reg.Close())
	}
	return nil
}

// acquire gives s the registration of what, an old one, a saved one or a new one. Image files
// have no saved state.
func (v State) acquire(s *Tracked, what bpf.Target, shift uint) error {
	dev, device := what.(bpf.Device)
	var state *savedState
	var unread string
	var err error
	if device {
		if state, unread, err = v.take(dev); err != nil {
			return err
		}
	}
	s.reg, err = s.tracker.Acquire(what)
	switch {
	case err == nil:
		loss := s.reg.Changed()
		if loss == 0 {
			return nil
		}
		s.began, state = loss.Reasons(), nil
		err = s.reg.Unregister()
	case errors.Is(err, bpf.ErrDamaged):
		s.began, state = []string{err.Error()}, nil
		err = s.tracker.Forget(what)
	case errors.Is(err, bpf.ErrNotRegistered):
		s.began = []string{"tracking of this device had not begun"}
		if !device {
			s.began = []string{"tracking of this image file had not begun"}
		}
		if why := s.tracker.Began(); why != "" {
			s.began = append(s.began, "the tracker was attached anew "+s.tracker.Since().UTC().Format(time.RFC3339)+": "+why)
		}
		err = nil
	}
	if err != nil {
		return err
	}
	if state != nil {
		if s.reg, err = v.resume(s.tracker, dev, state); err == nil {
			s.began, s.resumed = nil, true
			return nil
		}
		unread = err.Error()
	}
	if unread != "" {
		s.began = append(s.began, "the state saved before the last start was not used: "+unread)
	}
	s.reg, err = s.tracker.Register(what, shift)
	return err
}

// Began says why tracking had to begin anew, or nothing if it was adopted.
func (s *Tracked) Began() []string { return s.began }

// Resumed says whether a saved state is continued.
func (s *Tracked) Resumed() bool { return s.resumed }

// Granule is the size of a granule in bytes.
func (s *Tracked) Granule() int64 { return 1 << s.reg.GranuleShift() }

// Changes implements Source. It takes about as long as an RCU grace period.
func (s *Tracked) Changes(ctx context.Context, since ChangeID) (Delta, error) {
	if err := ctx.Err(); err != nil {
		return Delta{}, err
	}
	if err := s.writeBack(0, 0); err != nil {
		return Delta{}, err
	}
	closed, err := s.reg.Swap()
	if err != nil {
		return Delta{}, err
	}
	if loss := closed.Loss() & (bpf.LossReplaced | bpf.LossResized); loss != 0 {
		return Delta{}, fmt.Errorf("%s: %w: %v", s.reg.Target().Label(), ErrDeviceChanged, loss.Reasons())
	}
	s.reg.Fold()
	d := Delta{ID: ChangeID{s.reg.ID(), closed.Last()}}
	if d.Evidence, err = s.evidence(); err != nil {
		return Delta{}, err
	}
	d.Evidence.Closed, d.Evidence.LastEpoch = closed.Closed(), closed.Last()

	epochs, why := s.since(since, closed.Last())
	d.Unknown = why
	if len(epochs) > 0 {
		if d.Writers, err = s.writers(epochs[0].First(), closed.Last()); err != nil {
			return Delta{}, err
		}
	}
	for _, e := range epochs {
		for _, why := range judge(e) {
			if !slices.Contains(d.Unknown, why) {
				d.Unknown = append(d.Unknown, why)
			}
		}
		d.Evidence.add(e)
		d.Evidence.Earlier = d.Evidence.Earlier || !s.reg.Seen(e)
	}
	if len(d.Unknown) > 0 {
		d.Extents = Whole(closed.Size())
	} else {
		d.Extents = marked(epochs)
	}
	return d, nil
}

// evidence is what the judgement rests on, without what each epoch adds to it.
func (s *Tracked) evidence() (Evidence, error) {
	boot, err := bpf.BootID()
	e := Evidence{
		Method: "ebpf", Device: s.reg.Target().Number(), Granule: s.Granule(), Size: s.reg.Size(),
		BootID: boot, Attached: s.reg.Attached(), LinkIDs: s.reg.LinkIDs(), Programs: s.reg.ProgramNames(),
	}
	switch what := s.reg.Target().(type) {
	case bpf.Device:
		e.DiskSeq = what.DiskSeq
	case bpf.File:
		e.Method, e.FileSystem, e.Mount, e.Inode, e.Handle = MethodFile, what.FS, what.Mount, what.Inode, what.Handle
	}
	return e, err
}

// writeBack lets out what an image file has in the page cache of n bytes at off, 0 bytes for all
// that follows. Stores through a mapping are marked when writeback takes their page:
// what came before this is marked when it returns.
func (s *Tracked) writeBack(off, n int64) error {
	if s.file == nil {
		return nil
	}
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	if err := unix.SyncFileRange(int(s.file.Fd()), off, n, all); err != nil {
		return fmt.Errorf("write back %s: %w", s.file.Name(), err)
	}
	return nil
}

// marked are the extents that any of the epochs marked.
func marked(epochs []*bpf.Epoch) Extents {
	if len(epochs) == 0 {
		return nil
	}
	all := Bitmap{Words: epochs[0].Bitmap(), Shift: epochs[0].GranuleShift(), Size: epochs[0].Size()}
	if len(epochs) > 1 {
		all.Words = slices.Clone(all.Words) // the epoch's own stay as they are
	}
	for _, e := range epochs[1:] {
		all.Or(e.Bitmap())
	}
	return all.Extents()
}

func (s *Tracked) writers(first, last uint64) ([]Writer, error) {
	all, _, err := s.reg.Writers(first, last)
	out := make([]Writer, 0, len(all))
	for _, w := range all {
		out = append(out, Writer(w))
	}
	return out, err
}

// since finds the epochs that hold all after id up to last, or says why there
// are none.
func (s *Tracked) since(id ChangeID, last uint64) ([]*bpf.Epoch, []string) {
	switch {
	case id.IsZero():
		return nil, []string{"there is no earlier instant to count from"}
	case id.registration != s.reg.ID() && len(s.began) > 0:
		return nil, s.began
	case id.registration != s.reg.ID():
		return nil, []string{"the last point belongs to another tracking of this device"}
	case id.epoch > last:
		return nil, []string{fmt.Sprintf("the last point speaks of epoch %d, the tracker is at %d", id.epoch, last)}
	}
	var out []*bpf.Epoch
	next := id.epoch + 1
	for _, e := range s.reg.Retained() {
		if e.Last() < next {
			continue
		}
		if e.First() > next {
			break
		}
		out = append(out, e)
		next = e.Last() + 1
	}
	if next != last+1 {
		return nil, []string{fmt.Sprintf("epochs from %d on were given up after a backup to another repository", next)}
	}
	return out, nil
}

// judge says why an epoch can't be believed, or nothing.
func judge(e *bpf.Epoch) []string {
	return append(e.Taint().Reasons(), e.Loss().Reasons()...)
}

func (v *Evidence) add(e *bpf.Epoch) {
	kernel, counted := e.KernelSectors()
	switch {
	case v.FirstEpoch == 0:
		v.FirstEpoch, v.Opened = e.First(), e.Opened()
		if counted {
			v.KernelSectors = &kernel
		}
	case v.KernelSectors != nil && counted:
		*v.KernelSectors += kernel
	default:
		v.KernelSectors = nil
	}
	if trust, boot := e.Saved(); trust != 0 {
		v.SavedState = "of boot " + boot + map[bpf.Trust]string{
			bpf.SavedProven: ", untouched since by the times of its file", bpf.SavedTrusted: ", taken for untouched since, as told",
		}[trust]
	}
	v.Dirty += e.Dirty()
	v.Sectors += e.Sectors()
	v.Landed += e.Landed()
	v.addMisses(e.LeastMissed())
}

// addMisses adds, per program, what every copy may have missed. An epoch from before an upgrade may know of
// fewer programs, or more.
func (v *Evidence) addMisses(least []uint64) {
	if v.LeastMisses == nil {
		v.LeastMisses = make([]uint64, len(v.Programs))
	}
	for p := range min(len(v.LeastMisses), len(least)) {
		v.LeastMisses[p] += least[p]
	}
}

// Quiet implements Source.
func (s *Tracked) Quiet() (bool, Evidence, error) {
	// What was stored through a mapping shows now, as in Changes.
	if err := s.writeBack(0, 0); err != nil {
		return false, Evidence{}, err
	}
	now := time.Now()
	quiet, live, err := s.reg.Untouched()
	if err != nil || !quiet {
		return false, Evidence{}, err
	}
	e, err := s.evidence()
	e.addLive(live, s.reg.Current())
	e.Opened, e.Closed = s.reg.Opened(), now
	return err == nil, e, err
}

// Prepare implements Source.
func (s *Tracked) Prepare() error { return s.reg.Prepare() }

// Commit implements Source.
func (s *Tracked) Commit(id ChangeID) error {
	if id.registration != s.reg.ID() {
		return fmt.Errorf("commit %s: %w of this tracking", id, ErrChangeID)
	}
	s.reg.Release(id.epoch)
	return nil
}

// Writes implements Source.
func (s *Tracked) Writes() (uint64, error) {
	return s.reg.Events()
}

// Untrack stops the tracking and closes s.
func (s *Tracked) Untrack() error { return errors.Join(s.reg.Unregister(), s.Close()) }

// Close implements Source.
func (s *Tracked) Close() error {
	err := s.reg.Close()
	if s.file != nil {
		err = errors.Join(err, s.file.Close())
	}
	return err
}
