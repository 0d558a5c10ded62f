package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Granule sizes, as base-2 logarithms of bytes.
const (
	MinGranuleShift     = 12
	DefaultGranuleShift = 16
	MaxGranuleShift     = 20
)

// Registration is one tracked device, held by this process alone. Its methods
// are not safe for concurrent use.
type Registration struct {
	t        *Tracker
	dev      Device
	slot     uint32
	id       [2]uint64
	lock     *os.File
	current  *Epoch
	retained []*Epoch // closed, ascending
}

// Device is the device as it was when the registration was acquired.
func (r *Registration) Device() Device { return r.dev }

// ID tells this registration from every other one, before or after it.
func (r *Registration) ID() string { return fmt.Sprintf("%016x%016x", r.id[0], r.id[1]) }

// GranuleShift is the base-2 logarithm of the granule in bytes.
func (r *Registration) GranuleShift() uint { return r.current.GranuleShift() }

// Current is the number of the epoch in which writes are marked now.
func (r *Registration) Current() uint64 { return r.current.Last() }

// Retained are the closed epochs that were not released yet, ascending. They
// belong to r.
func (r *Registration) Retained() []*Epoch { return slices.Clone(r.retained) }

// Changed says whether the device is another one than when it was
// registered: LossReplaced, LossResized or 0.
func (r *Registration) Changed() Loss { return r.current.changed(r.dev) }

func (e *Epoch) changed(now Device) Loss {
	var l Loss
	if now.DiskSeq != e.DiskSeq() {
		l |= LossReplaced
	}
	if now.Size != e.Size() {
		l |= LossResized
	}
	return l
}

// Register starts tracking dev with granules of 1<<shift bytes, and returns a held
// registration. Writes in flight need not be waited for: they are marked when they
// complete, or, where a bio no longer tells where it wrote, taint the epoch.
func (t *Tracker) Register(dev Device, shift uint) (*Registration, error) {
	if shift < MinGranuleShift || shift > MaxGranuleShift {
		return nil, fmt.Errorf("granule of 2^%d bytes: must be 4 KiB to 1 MiB", shift)
	}
	lock, err := lockDir(t.dir, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Close() }()
	if !t.intact() {
		return nil, ErrDetached
	}
	var d trackerDevice
	if err := t.maps.Devices.Lookup(dev.key(), &d); err == nil {
		return nil, fmt.Errorf("%s: tracked already", dev.Path)
	}
	slot, err := t.freeSlot()
	if err != nil {
		return nil, err
	}
	dir := t.slotDir(slot)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	r := &Registration{t: t, dev: dev, slot: slot, id: [2]uint64{random64(), random64()}}
	if r.lock, err = lockDir(dir, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s: %w", dev.Path, err)
	}
	// What an interrupted registration left behind.
	if err := clearDir(dir); err != nil {
		_ = r.Close()
		return nil, err
	}
	if err := t.resetCounts(slot); err != nil {
		_ = r.Close()
		return nil, err
	}
	granules := uint64(dev.Size+(1<<shift)-1) >> shift
	if r.current, err = r.begin(shape{n: 1, granules: granules, shift: shift, size: dev.Size, diskSeq: dev.DiskSeq, tracked: uint64(time.Now().UnixNano())}); err != nil {
		_ = r.Close()
		return nil, err
	}
	if err := t.maps.Epochs.Put(slot, r.current.m); err != nil {
		_ = r.Close()
		return nil, fmt.Errorf("install the first epoch: %w", err)
	}
	d = trackerDevice{Slot: slot, GranuleShift: uint32(shift), Granules: r.current.Granules()}
	if err := t.maps.Devices.Put(dev.key(), d); err != nil {
		_ = r.Close()
		return nil, fmt.Errorf("register %s: %w", dev.Path, err)
	}
	t.mu.Lock()
	t.open[r] = struct{}{}
	t.mu.Unlock()
	return r, nil
}

func (t *Tracker) freeSlot() (uint32, error) {
	var used [maxDevices]bool
	var key uint32
	var d trackerDevice
	it := t.maps.Devices.Iterate()
	for it.Next(&key, &d) {
		if d.Slot < maxDevices {
			used[d.Slot] = true
		}
	}
	if err := it.Err(); err != nil {
		return 0, fmt.Errorf("read the devices: %w", err)
	}
	for i, u := range used {
		if !u {
			return uint32(i), nil
		}
	}
	return 0, fmt.Errorf("%w: %d devices are tracked", ErrFull, maxDevices)
}

// Forget drops what is tracked under dev's number, also if it can't be acquired
// because its pins are damaged. The error wraps ErrBusy if it is in use.
func (t *Tracker) Forget(dev Device) error {
	lock, err := lockDir(t.dir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	var d trackerDevice
	if err := t.maps.Devices.Lookup(dev.key(), &d); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		return fmt.Errorf("look up %s: %w", dev.Path, err)
	}
	slot, err := lockDir(t.slotDir(d.Slot), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		defer func() { _ = slot.Close() }()
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", dev.Path, err)
	}
	if err := t.maps.Devices.Delete(dev.key()); err != nil {
		return fmt.Errorf("forget %s: %w", dev.Path, err)
	}
	return os.RemoveAll(t.slotDir(d.Slot))
}

// Acquire takes hold of a device that is tracked. Errors wrap ErrNotRegistered
// or ErrBusy. Look at Changed before you believe it.
func (t *Tracker) Acquire(dev Device) (*Registration, error) {
	var d trackerDevice
	if err := t.maps.Devices.Lookup(dev.key(), &d); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("%s: %w", dev.Path, ErrNotRegistered)
		}
		return nil, fmt.Errorf("look up %s: %w", dev.Path, err)
	}
	r := &Registration{t: t, dev: dev, slot: d.Slot}
	var err error
	if r.lock, err = lockDir(t.slotDir(d.Slot), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s: %w", dev.Path, err)
	}
	if err := r.load(); err != nil {
		_ = r.Close()
		return nil, fmt.Errorf("%s: %w: %w", dev.Path, ErrDamaged, err)
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

// shape is what an epoch takes over from the one before. Size and diskSeq are those
// of the registration: a change is a loss, not a new base.
type shape struct {
	n, granules uint64
	shift       uint
	size        int64
	diskSeq     uint64
	tracked     uint64 // UnixNano
}

// begin makes and pins an epoch; nothing writes to it before it is installed.
// What it records as its beginning is read before that.
func (r *Registration) begin(s shape) (*Epoch, error) {
	e, err := newEpoch(s.granules)
	if err != nil {
		return nil, err
	}
	missed, err := r.t.Misses()
	if err != nil {
		e.close()
		return nil, err
	}
	w := e.mem.words
	w[hdrMagic] = headerMagic
	w[hdrShift] = uint64(s.shift)
	w[hdrGranules] = s.granules
	w[hdrSize] = uint64(s.size)
	w[hdrDev] = uint64(r.dev.key())
	w[hdrDiskSeq] = s.diskSeq
	w[hdrID], w[hdrID+1] = r.id[0], r.id[1]
	w[hdrFirst], w[hdrLast] = s.n, s.n
	w[hdrOpenedAt] = uint64(time.Now().UnixNano())
	w[hdrInstance] = r.t.instance
	w[hdrTracked] = s.tracked
	copy(w[hdrMissBase:], missed[:])
	w[hdrHostBase] = r.t.hostMap.words[hostNoEpoch]
	w[hdrHostBase+1] = r.t.hostMap.words[hostPassthrough]
	counts, err := r.t.counts(r.slot)
	if err != nil {
		e.close()
		return nil, err
	}
	w[hdrSectors] = counts.SubmitSectors
	e.pin = filepath.Join(r.t.slotDir(r.slot), fmt.Sprintf("e%016x", s.n))
	if err := e.m.Pin(e.pin); err != nil {
		e.close()
		return nil, fmt.Errorf("pin epoch %d: %w", s.n, err)
	}
	return e, nil
}

// Swap closes the current epoch and begins the next. The closed epoch is
// complete: the kernel has waited for every program that could still mark in
// it. It stays retained, also when this process dies, until Release.
func (r *Registration) Swap() (*Epoch, error) {
	c := r.current
	next, err := r.begin(shape{n: c.Last() + 1, granules: c.Granules(), shift: c.GranuleShift(), size: c.Size(), diskSeq: c.DiskSeq(), tracked: c.hdr(hdrTracked)})
	if err != nil {
		return nil, err
	}
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
	loss, missed, err := r.losses(e)
	if err != nil {
		return err
	}
	counts, err := r.t.counts(r.slot)
	if err != nil {
		return err
	}
	w := e.mem.words
	copy(w[hdrMissed:], missed[:])
	w[hdrSectors] = counts.SubmitSectors - w[hdrSectors]
	w[hdrLoss] |= uint64(loss)
	w[hdrClosedAt] = uint64(time.Now().UnixNano())
	w[hdrClosed] = 1
	return nil
}

// losses is what was lost since e was opened, and the events missed.
func (r *Registration) losses(e *Epoch) (Loss, Misses, error) {
	missed, err := r.t.Misses()
	if err != nil {
		return 0, missed, err
	}
	var loss Loss
	for p := range programs {
		least := ^uint64(0)
		for i := p * copies; i < (p+1)*copies; i++ {
			missed[i] -= e.hdr(hdrMissBase + i)
			least = min(least, missed[i])
		}
		if least > 0 {
			loss |= LossMissed
		}
	}
	if !r.t.intact() || e.hdr(hdrInstance) != r.t.instance {
		loss |= LossDetached
	}
	if r.t.hostMap.words[hostNoEpoch] != e.hdr(hdrHostBase) {
		loss |= LossHost
	}
	if r.t.hostMap.words[hostPassthrough] != e.hdr(hdrHostBase+1) {
		loss |= LossPassthrough
	}
	now, err := Lookup(r.dev.Path)
	if err != nil || now.key() != r.dev.key() {
		loss |= LossReplaced
	} else {
		loss |= e.changed(now)
	}
	return loss, missed, nil
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
}

// Close lets go of the device. Tracking goes on.
func (r *Registration) Close() error {
	if r.lock == nil {
		return nil
	}
	r.t.mu.Lock()
	delete(r.t.open, r)
	r.t.mu.Unlock()
	for _, e := range r.retained {
		e.close()
	}
	if r.current != nil {
		r.current.close()
	}
	r.retained, r.current = nil, nil
	err := r.lock.Close()
	r.lock = nil
	return err
}

// Unregister stops tracking and forgets the device's epochs. It closes r.
func (r *Registration) Unregister() error {
	lock, err := lockDir(r.t.dir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	err = r.t.maps.Devices.Delete(r.dev.key())
	if err == nil {
		err = clearDir(r.t.slotDir(r.slot))
	}
	return errors.Join(err, r.Close())
}

// Counts are the events of one device since it was registered.
type Counts struct {
	Submits, SubmitSectors       uint64 // write bios, 512-byte sectors
	Completions, CompleteSectors uint64
	Discards                     uint64 // and write-zeroes
	Passthrough                  uint64
}

// Events changes whenever any copy of a program ran for the device or was
// dropped on this host: as long as it stays the same, nobody wrote.
func (r *Registration) Events() (uint64, error) {
	missed, err := r.t.Misses()
	if err != nil {
		return 0, err
	}
	var n uint64
	for _, m := range missed {
		n += m
	}
	for c := range uint32(copies) {
		sum, err := r.t.copyCounts(r.slot, c)
		if err != nil {
			return 0, err
		}
		n += sum.Submits + sum.Completions + sum.Passthrough
	}
	return n, nil
}

// resetCounts makes a slot's counters begin at 0 for its new device.
func (t *Tracker) resetCounts(slot uint32) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count processors: %w", err)
	}
	for c := range uint32(copies) {
		if err := t.maps.Counts.Put(slot*copies+c, make([]trackerCounters, cpus)); err != nil {
			return fmt.Errorf("reset counters: %w", err)
		}
	}
	return nil
}

// counts takes, of the copies, the one that saw most.
func (t *Tracker) counts(slot uint32) (Counts, error) {
	var best Counts
	for c := range uint32(copies) {
		sum, err := t.copyCounts(slot, c)
		if err != nil {
			return best, err
		}
		best.Submits = max(best.Submits, sum.Submits)
		best.SubmitSectors = max(best.SubmitSectors, sum.SubmitSectors)
		best.Completions = max(best.Completions, sum.Completions)
		best.CompleteSectors = max(best.CompleteSectors, sum.CompleteSectors)
		best.Discards = max(best.Discards, sum.Discards)
		best.Passthrough = max(best.Passthrough, sum.Passthrough)
	}
	return best, nil
}

// copyCounts adds up what one copy counted on all processors.
func (t *Tracker) copyCounts(slot, c uint32) (Counts, error) {
	var sum Counts
	var perCPU []trackerCounters
	if err := t.maps.Counts.Lookup(slot*copies+c, &perCPU); err != nil {
		return sum, fmt.Errorf("counters: %w", err)
	}
	for _, v := range perCPU {
		sum.Submits += v.Submits
		sum.SubmitSectors += v.SubmitSectors
		sum.Completions += v.Completions
		sum.CompleteSectors += v.CompleteSectors
		sum.Discards += v.Discards
		sum.Passthrough += v.Passthrough
	}
	return sum, nil
}
