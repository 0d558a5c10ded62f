package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Granule sizes, as base-2 logarithms of bytes.
const (
	MinGranuleShift     = 12
	DefaultGranuleShift = 16
	MaxGranuleShift     = 20
)

// Registration is one tracked device or image file, held by this process alone. Its methods
// are not safe for concurrent use.
type Registration struct {
	t        *Tracker
	what     Target
	programs programSet
	slot     uint32
	id       [2]uint64
	lock     *dirLock
	current  *Epoch
	spare    *Epoch   // for the next swap, not pinned yet
	retained []*Epoch // closed, ascending
}

// Target is what is tracked, as it was when the registration was acquired.
func (r *Registration) Target() Target { return r.what }

// ProgramNames are the programs that see its writes, in the order of [Epoch.Missed].
func (r *Registration) ProgramNames() []string { return r.programs.names() }

// Present are, of the misses of all copies, those of the copies that are attached.
func (r *Registration) Present(missed []uint64) []uint64 { return r.programs.present(missed) }

// LinkIDs are the kernel's IDs of their links, copies of a program one after the other.
func (r *Registration) LinkIDs() []uint32 { return slices.Clone(r.programs.links()) }

// Attached is when they were attached.
func (r *Registration) Attached() time.Time { return r.programs.attached() }

// ID tells this registration from every other one, before or after it.
func (r *Registration) ID() string { return fmt.Sprintf("%016x%016x", r.id[0], r.id[1]) }

// GranuleShift is the base-2 logarithm of the granule in bytes.
func (r *Registration) GranuleShift() uint { return r.current.GranuleShift() }

// Size is that of the device or file when it was registered, in bytes.
func (r *Registration) Size() int64 { return r.current.Size() }

// Current is the number of the epoch in which writes are marked now.
func (r *Registration) Current() uint64 { return r.current.Last() }

// Opened is when that epoch began.
func (r *Registration) Opened() time.Time { return r.current.Opened() }

// Retained are the closed epochs that were not released yet, ascending. They
// belong to r.
func (r *Registration) Retained() []*Epoch { return slices.Clone(r.retained) }

// Changed says whether the target is another one than when it was
// registered: LossReplaced, LossResized, LossTable or 0.
func (r *Registration) Changed() Loss { return r.what.changed(r.current) }

// Register starts tracking what with granules of 1<<shift bytes, and returns a held
// registration. Writes in flight need not be waited for: they are marked when they
// complete, or, where a bio no longer tells where it wrote, taint the epoch.
func (t *Tracker) Register(what Target, shift uint) (*Registration, error) {
	return t.register(what, shift, nil)
}

// register continues what was saved, if it is not nil.
func (t *Tracker) register(what Target, shift uint, saved *Saved) (*Registration, error) {
	if shift < MinGranuleShift || shift > MaxGranuleShift {
		return nil, fmt.Errorf("granule of 2^%d bytes: must be 4 KiB to 1 MiB", shift)
	}
	lock, err := lockDir(t.dir, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Close() }()
	if t.superseded() || !t.intact() {
		return nil, ErrDetached
	}
	if _, ok, err := what.find(t); err != nil {
		return nil, err
	} else if ok {
		return nil, fmt.Errorf("%s: tracked already, or another one with the same number is", what.Label())
	}
	set, err := what.programs(t, true)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what.Label(), err)
	}
	slot, err := t.freeSlot()
	if err != nil {
		return nil, err
	}
	dir := t.slotDir(slot)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	if dev, ok := what.(Device); ok && strings.HasPrefix(dev.Name, "nvme") {
		if err := t.watchNVMe(); err != nil {
			return nil, err
		}
	}
	r := &Registration{t: t, what: what, programs: set, slot: slot, id: [2]uint64{random64(), random64()}}
	if r.lock, err = lockDir(dir, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s: %w", what.Label(), err)
	}
	// What an interrupted registration left behind.
	if err := clearDir(dir); err != nil {
		_ = r.Close()
		return nil, err
	}
	if err := r.install(shift, saved); err != nil {
		_ = r.Close()
		return nil, fmt.Errorf("register %s: %w", what.Label(), err)
	}
	t.mu.Lock()
	t.open[r] = struct{}{}
	t.mu.Unlock()
	return r, nil
}

// install gives r its first epoch and shows the device to the programs.
func (r *Registration) install(shift uint, saved *Saved) error {
	if err := r.t.resetCounts(r.slot); err != nil {
		return err
	}
	if err := r.t.forgetWriters(r.slot, 0, ^uint64(0)); err != nil {
		return err
	}
	var err error
	s := r.what.shape(shift)
	if saved != nil {
		if s.n, err = r.restore(s, saved); err != nil {
			return err
		}
	}
	if r.current, err = r.begin(s); err != nil {
		return err
	}
	// Waits for a grace period, as insert wants it.
	if err := r.t.maps.Epochs.Put(r.slot, r.current.m); err != nil {
		return fmt.Errorf("install the first epoch: %w", err)
	}
	return r.what.insert(r.t, r.slot, shift)
}

func granules(size int64, shift uint) uint64 { return uint64(size+(1<<shift)-1) >> shift }

func (t *Tracker) freeSlot() (uint32, error) {
	used, err := t.usedSlots()
	if err != nil {
		return 0, err
	}
	for i, u := range used {
		if !u {
			return uint32(i), nil
		}
	}
	return 0, fmt.Errorf("%w: %d devices and files are tracked", ErrFull, maxDevices)
}

// usedSlots tells of each slot whether a device or file has it.
func (t *Tracker) usedSlots() (used [maxDevices]bool, err error) {
	t.devices.all(func(_ uint32, p place) bool {
		if p.slot < maxDevices {
			used[p.slot] = true
		}
		return true
	})
	err = t.eachFile(func(_ filesFileKey, f filesImage) bool {
		if f.Slot < maxDevices {
			used[f.Slot] = true
		}
		return true
	})
	return used, err
}

// Forget drops what is tracked under the number of what, also if it can't be acquired
// because its pins are damaged. The error wraps ErrBusy if it is in use.
func (t *Tracker) Forget(what Target) error {
	lock, err := lockDir(t.dir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if t.superseded() {
		return ErrDetached
	}
	at, ok, err := what.find(t)
	if err != nil || !ok {
		return err
	}
	slot, err := lockDir(t.slotDir(at), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		defer func() { _ = slot.Close() }()
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", what.Label(), err)
	}
	if err := what.remove(t); err != nil {
		return err
	}
	return os.RemoveAll(t.slotDir(at))
}

// Acquire takes hold of what is tracked. Errors wrap ErrNotRegistered, ErrBusy or
// ErrDamaged. Look at Changed before you believe it.
func (t *Tracker) Acquire(what Target) (*Registration, error) {
	slot, ok, err := what.find(t)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("%s: %w", what.Label(), ErrNotRegistered)
	}
	r := &Registration{t: t, what: what, slot: slot}
	r.lock, err = lockDir(t.slotDir(slot), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: %w", what.Label(), ErrDamaged, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what.Label(), err)
	}
	// An upgrade holds the lock that r has now: after it, r's maps are nobody's.
	if t.superseded() {
		_ = r.Close()
		return nil, ErrDetached
	}
	if r.programs, err = what.programs(t, false); err == nil {
		err = r.load()
	}
	if err != nil {
		_ = r.Close()
		return nil, fmt.Errorf("%s: %w: %w", what.Label(), ErrDamaged, err)
	}
	t.mu.Lock()
	t.open[r] = struct{}{}
	t.mu.Unlock()
	return r, nil
}

// load reads the pinned epochs, and finishes what a killed process began.
func (r *Registration) load() error {
	all, err := r.t.pinnedEpochs(r.slot)
	if err != nil {
		return err
	}
	var installed uint32
	if err := r.t.maps.Epochs.Lookup(r.slot, &installed); err != nil {
		for _, e := range all {
			e.close()
		}
		return fmt.Errorf("current epoch: %w", err)
	}
	for _, e := range all {
		if uint32(e.id) == installed {
			r.current = e
			r.id = [2]uint64{e.hdr(hdrID), e.hdr(hdrID + 1)}
		} else {
			r.retained = append(r.retained, e)
		}
	}
	if r.current == nil {
		return errors.New("the current epoch is not pinned any more")
	}
	// Of a process that went on after all pins had been removed under it.
	r.drop(func(e *Epoch) bool { return e.hdr(hdrID) != r.id[0] || e.hdr(hdrID+1) != r.id[1] })
	// Pinned but never installed: the process died before the swap.
	r.drop(func(e *Epoch) bool { return e.Last() > r.current.Last() })
	// Merged into a newer one, which the process died too early to unpin.
	r.drop(func(e *Epoch) bool {
		return slices.ContainsFunc(r.retained, func(o *Epoch) bool {
			return o != e && o.First() <= e.First() && o.Last() > e.Last()
		})
	})
	for _, e := range r.retained {
		if e.hdr(hdrClosed) == 0 {
			if err := r.finish(e); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *Tracker) pinnedEpochs(slot uint32) ([]*Epoch, error) {
	dir := t.slotDir(slot)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []*Epoch
	for _, f := range entries {
		if !strings.HasPrefix(f.Name(), "e") {
			continue
		}
		e, err := loadEpoch(filepath.Join(dir, f.Name()))
		if err != nil {
			for _, e := range all {
				e.close()
			}
			return nil, err
		}
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *Epoch) int {
		if a.Last() < b.Last() {
			return -1
		}
		return 1
	})
	return all, nil
}

// drop releases the retained epochs that which chooses.
func (r *Registration) drop(which func(*Epoch) bool) {
	r.retained = slices.DeleteFunc(r.retained, func(e *Epoch) bool {
		if !which(e) {
			return false
		}
		_ = os.Remove(e.pin)
		e.close()
		return true
	})
}

// shape is what an epoch takes over from the one before. Size, start, diskSeq and table
// are those of the registration: a change is a loss, not a new base.
type shape struct {
	n, granules    uint64
	shift          uint
	size           int64
	start          uint64 // sectors
	diskSeq, table uint64
	tracked        uint64 // UnixNano
}

// next is the shape of the epoch after e.
func (e *Epoch) next() shape {
	return shape{
		n: e.Last() + 1, granules: e.Granules(), shift: e.GranuleShift(), size: e.Size(), start: e.hdr(hdrStart),
		diskSeq: e.DiskSeq(), table: e.hdr(hdrTable), tracked: e.hdr(hdrTracked),
	}
}

// begin makes and pins an epoch; nothing writes to it before it is installed.
// What it records as its beginning is read before that.
func (r *Registration) begin(s shape) (*Epoch, error) {
	if err := r.prepare(s.granules); err != nil {
		return nil, err
	}
	e := r.spare
	r.spare = nil
	missed, err := r.programs.missed()
	if err != nil {
		e.close()
		return nil, err
	}
	w := e.mem.words
	w[hdrMagic] = headerMagic
	w[hdrShift] = uint64(s.shift)
	w[hdrGranules] = s.granules
	w[hdrSize] = uint64(s.size)
	w[hdrDev] = r.what.id()
	w[hdrStart] = s.start
	w[hdrDiskSeq] = s.diskSeq
	w[hdrTable] = s.table
	w[hdrID], w[hdrID+1] = r.id[0], r.id[1]
	w[hdrFirst], w[hdrLast] = s.n, s.n
	w[hdrOpenedAt] = uint64(time.Now().UnixNano())
	w[hdrInstance] = r.programs.instanceID()
	w[hdrTracked] = s.tracked
	w[hdrHooks] = r.programs.changes()
	w[hdrPrograms] = uint64(len(missed))
	copy(w[hdrMissBase:hdrMissed], missed)
	w[hdrHostBase] = r.t.hostMap.words[hostNoEpoch]
	w[hdrHostBase+1] = r.t.hostMap.words[hostPassthrough]
	counts, err := r.t.counts(r.slot)
	if err != nil {
		e.close()
		return nil, err
	}
	w[hdrBase], w[hdrBase+1] = counts.SubmitSectors, counts.CompleteSectors
	// After the programs' counts, as finish takes it before them: a write that is
	// just being counted is never in the kernel's alone.
	if n, ok := r.what.kernelSectors(); ok {
		w[hdrBase+2], w[hdrCounting] = n, 1
	}
	e.pin = filepath.Join(r.t.slotDir(r.slot), epochName(s.n))
	if err := e.m.Pin(e.pin); err != nil {
		e.close()
		return nil, fmt.Errorf("pin epoch %d: %w", s.n, err)
	}
	return e, nil
}

// prepare makes the spare epoch if there is none.
func (r *Registration) prepare(granules uint64) error {
	if r.spare != nil {
		return nil
	}
	var err error
	r.spare, err = newEpoch(granules)
	return err
}

// Prepare does what can be done of the next Swap before it: for a large disk with small
// granules, the kernel takes a while to give the memory.
func (r *Registration) Prepare() error { return r.prepare(r.current.Granules()) }

// Swap closes the current epoch and begins the next. The closed epoch is
// complete: the kernel has waited for every program that could still mark in
// it. It stays retained, also when this process dies, until Release.
func (r *Registration) Swap() (*Epoch, error) {
	// One whose losses could not be written down is not to be believed as it is.
	for _, e := range r.retained {
		if e.hdr(hdrClosed) == 0 {
			if err := r.finish(e); err != nil {
				return nil, err
			}
		}
	}
	c := r.current
	changes := r.programs.changes()
	if hooksChanged(c.hdr(hdrHooks), changes) {
		if err := r.what.settle(); err != nil {
			return nil, err
		}
	}
	next, err := r.begin(c.next())
	if err != nil {
		return nil, err
	}
	next.mem.words[hdrHooks] = changes // those after this look are next's
	if err := r.t.maps.Epochs.Put(r.slot, next.m); err != nil {
		_ = os.Remove(next.pin)
		next.close()
		return nil, fmt.Errorf("swap epochs: %w", err)
	}
	r.current = next
	r.retained = append(r.retained, c)
	if err := r.finish(c); err != nil {
		return nil, err
	}
	return c, nil
}

// finish writes down what was lost while e was open. It may come late: then it
// blames e for losses after its end too, never for less than its own.
func (r *Registration) finish(e *Epoch) error {
	so, err := r.soFar(e)
	if err != nil {
		return err
	}
	w := e.mem.words
	copy(w[hdrMissed:], so.missed)
	w[hdrVouched] = so.vouched
	w[hdrSectors], w[hdrLanded], w[hdrKernel] = so.sectors, so.landed, so.kernel
	if !so.counting {
		w[hdrCounting] = 0
	}
	w[hdrLoss] |= uint64(so.loss)
	w[hdrClosedAt] = uint64(time.Now().UnixNano())
	w[hdrClosed] = 1
	return nil
}

// soFar is what happened since an epoch was opened.
type soFar struct {
	loss                    Loss
	missed                  []uint64
	vouched                 uint64 // see hdrVouched
	sectors, landed, kernel uint64
	counting                bool // kernel is known
}

// soFar looks at e, which was not closed yet.
func (r *Registration) soFar(e *Epoch) (so soFar, err error) {
	if so.missed, err = r.programs.missed(); err != nil {
		return so, err
	}
	ever, whole := slices.Clone(so.missed), r.programs.wholeCalls()
	for i := range so.missed {
		so.missed[i] -= e.hdr(hdrMissBase + i)
	}
	var suspect uint64
	for p := range len(so.missed) / copies {
		if lostEvents(so.missed[p*copies:(p+1)*copies], ever[p*copies:(p+1)*copies], whole) {
			suspect |= 1 << p
		}
	}
	vouched := uint64(0)
	if suspect != 0 || r.programs.stray(ever, 0) {
		if vouched, err = r.programs.vouched(); err != nil {
			return so, err
		}
	}
	if so.vouched = vouched | ^suspect; so.vouched != ^uint64(0) {
		so.loss |= LossMissed
	}
	if !r.programs.intact() || e.hdr(hdrInstance) != r.programs.instanceID() {
		so.loss |= LossDetached
	}
	if r.t.hostMap.words[hostNoEpoch] != e.hdr(hdrHostBase) {
		so.loss |= LossHost
	}
	if r.t.hostMap.words[hostPassthrough] != e.hdr(hdrHostBase+1) {
		so.loss |= LossPassthrough
	}
	if hooksChanged(e.hdr(hdrHooks), r.programs.changes()) {
		so.loss |= LossHooks
	}
	now, err := r.what.lookAgain()
	if err != nil || now.id() != r.what.id() {
		so.loss |= LossReplaced
	} else {
		so.loss |= now.changed(e)
		if d, ok := now.(Device); ok && d.BioBased && r.programs.stray(ever, vouched) {
			so.loss |= LossMissed
		}
	}
	kernel, counting := r.what.kernelSectors()
	counts, err := r.t.counts(r.slot)
	if err != nil {
		return so, err
	}
	so.sectors = counts.SubmitSectors - e.hdr(hdrBase)
	so.landed = counts.CompleteSectors - e.hdr(hdrBase+1)
	if so.counting = counting && e.hdr(hdrCounting) == 1; !so.counting {
		return so, nil
	}
	so.kernel = kernel - e.hdr(hdrBase+2)
	if countedAll(so.missed) && uncounted(so.kernel, so.sectors, so.landed, runtime.NumCPU()) {
		so.loss |= LossUncounted
	}
	return so, nil
}

// maxRetained bounds the memory of backups that fail again and again.
const maxRetained = 4

// Fold merges retained epochs until few are left. Nothing that they saw is lost.
func (r *Registration) Fold() {
	for len(r.retained) > maxRetained {
		old, into := r.retained[0], r.retained[1]
		into.merge(old)
		r.drop(func(e *Epoch) bool { return e == old })
	}
}

// Release gives up the retained epochs up to number last: a backup that used
// them is durable.
func (r *Registration) Release(last uint64) {
	r.drop(func(e *Epoch) bool { return e.Last() <= last })
	_ = r.t.forgetWriters(r.slot, 0, last) // what stays only takes room
}

// Close lets go of the device. Tracking goes on.
func (r *Registration) Close() error {
	if r.lock == nil {
		return nil
	}
	r.t.mu.Lock()
	delete(r.t.open, r)
	r.t.letGo(r.programs)
	r.t.mu.Unlock()
	r.closeEpochs()
	err := r.lock.Close()
	r.lock = nil
	return err
}

func (r *Registration) closeEpochs() {
	for _, e := range r.retained {
		e.close()
	}
	if r.current != nil {
		r.current.close()
	}
	if r.spare != nil {
		r.spare.close()
	}
	r.retained, r.current, r.spare = nil, nil, nil
}

// Unregister stops tracking and forgets the device's epochs. It closes r.
func (r *Registration) Unregister() error {
	lock, err := lockDir(r.t.dir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if r.t.superseded() {
		// All pins were removed: what stands in their place now is not r's.
		return errors.Join(ErrDetached, r.Close())
	}
	return errors.Join(r.what.remove(r.t), clearDir(r.t.slotDir(r.slot)), r.Close())
}
