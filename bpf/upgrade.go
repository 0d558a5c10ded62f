package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
)

// CanUpgrade tells whether programs can be replaced without a gap on this kernel.
func CanUpgrade() bool { return wholeCalls() }

// upgrade replaces t's programs by n copies of this binary's, for the reason why if they are
// more than t's, in a new generation, so that at every
// moment one of the two marks in an epoch that counts:
//
//  1. build: the new programs are attached, with maps of their own and no device; those for image files too.
//  2. show: they see the devices, and mark in an epoch that is thrown away. From here on the
//     new in-flight table knows the bios that are submitted.
//  3. begin: each device gets the epoch after its current one in the new tracker. It is
//     pinned beside those of the old, but installed in the new alone.
//  4. publish: the new generation's meta is pinned. It is the tracker from here on.
//  5. retire: the old current epochs are closed with the old programs' counters, and then
//     the old programs are detached.
//
// Of an image file, this can't be had without a gap (hookchange.go): the epoch in which the old programs
// end and the one in which the new ones begin are lost, but registration and change IDs go on.
//
// A process that dies before 4 leaves a generation that is cleared away, and epochs that were never
// installed in the tracker; after it, the next to come does what is left of 5. It returns t if the
// upgrade has to wait or fails before 4, and t.Outdated says why.
func (t *Tracker) upgrade(n int, why string) (*Tracker, error) {
	if !CanUpgrade() {
		// A call that began before the new programs were attached may be stopped before the old ones
		// ran, until they have no device any more: a completion that nobody marks.
		t.outdated = "this kernel can stop a tracepoint's call between its programs (7.0 and later): those of another version stay until the next start or `tidemark untrack --all`"
		return t, nil
	}
	locks, err := lockSlots(t.dir)
	defer locks.close()
	if err != nil {
		// The process that holds it has the old maps mapped, and must not lose them.
		t.outdated = fmt.Sprintf("the upgrade of the tracker's programs waits: a device is %v", err)
		return t, nil
	}
	next := newTracker(t.options, t.gen+1)
	next.copies, next.grown = n, why
	next.step("build")
	t.beginHookChange()
	if err = next.build(); err == nil {
		err = next.attachAsIn(t)
	}
	var begun []*Epoch
	var lost []string
	if err == nil {
		next.beginHookChange() // until t's are detached
		begun, lost, err = next.takeOver(t)
	}
	if err == nil {
		next.step("publish")
		err = next.publish(strings.Join(append([]string{t.began}, lost...), "; "))
	}
	defer func() {
		for _, e := range begun {
			e.close()
		}
	}()
	if err != nil {
		for _, e := range begun {
			_ = os.Remove(e.pin)
		}
		next.closeAll()
		if detached, e := next.unpin(); detached && e == nil { // or it is done by the next to come
			t.endHookChange()
		}
		t.outdated = fmt.Sprintf("the upgrade of the tracker's programs failed: %v", err)
		return t, nil
	}
	defer t.closeAll()
	next.step("retire")
	detached, err := t.retire()
	if detached {
		next.endHookChange()
	}
	if err == nil {
		err = next.sweep()
	}
	if err != nil {
		next.closeAll()
		return nil, fmt.Errorf("end the tracker of another version: %w", err)
	}
	next.step("done")
	return next, nil
}

// Seen tells whether it was the programs that are attached now that marked in e, and not those
// of a version before.
func (r *Registration) Seen(e *Epoch) bool { return e.hdr(hdrInstance) == r.programs.instanceID() }

func (t *Tracker) step(name string) {
	if t.options.Step != nil {
		t.options.Step(name)
	}
}

// sweep forgets the epochs that belong to no device or file of t: of one that could not be taken
// over, or whose registration was interrupted. The caller holds the lock of the tracker's directory.
func (t *Tracker) sweep() error {
	used, err := t.usedSlots()
	if err != nil {
		return err
	}
	dirs, err := filepath.Glob(filepath.Join(t.dir, "dev-*"))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		n, err := strconv.ParseUint(strings.TrimPrefix(filepath.Base(d), "dev-"), 10, 32)
		if err == nil && n < maxDevices && used[n] {
			continue
		}
		if err := os.RemoveAll(d); err != nil {
			return fmt.Errorf("forget the epochs of what is not tracked any more: %w", err)
		}
	}
	return nil
}

// takeOver makes the devices and image files of old t's too, each with the epoch after old's current one.
// It says which can't be taken over.
func (t *Tracker) takeOver(old *Tracker) (begun []*Epoch, lost []string, err error) {
	copy(t.hostMap.words[hostNVMeOps:hostWords], old.hostMap.words[hostNVMeOps:hostWords])
	var regs []*Registration
	defer func() {
		for _, r := range regs {
			r.closeEpochs()
		}
	}()
	var places []place
	old.devices.all(func(_ uint32, p place) bool {
		r := &Registration{t: old, what: p.device(), programs: blockPrograms{old}, slot: p.slot}
		if e := r.load(); e != nil { // upgrade has locked it
			lost = append(lost, fmt.Sprintf("device %s was not taken over by an upgrade: %v: %v", r.what.Number(), ErrDamaged, e))
			r.closeEpochs()
			return true
		}
		r.Fold()
		regs, places = append(regs, r), append(places, p)
		return true
	})
	files, notTaken, err := t.filesOf(old)
	regs, lost = append(regs, files...), append(lost, notTaken...)
	if err != nil {
		return nil, nil, err
	}
	t.step("show")
	// Marks go nowhere: only the old tracker's count yet.
	blind, err := newEpoch(1)
	if err != nil {
		return nil, nil, err
	}
	defer blind.close()
	for i, r := range regs {
		if err := t.continueCounts(old, r.slot); err != nil {
			return nil, nil, err
		}
		if err := t.maps.Epochs.Put(r.slot, blind.m); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", r.name(), err)
		}
		if i < len(places) {
			err = t.devices.insert(places[i])
		} else {
			err = r.what.insert(t, r.slot, 0)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	// Each Put ends after a grace period: then every program sees what was put before.
	grace := func() error {
		if len(regs) == 0 {
			return nil
		}
		return t.maps.Epochs.Put(regs[0].slot, blind.m)
	}
	if err := grace(); err != nil {
		return nil, nil, err
	}
	// A bio that the new programs did not see submitted must complete before their first epoch, or
	// makes it unknown.
	if err := errors.Join(old.drain(drainLimit), grace()); err != nil {
		return nil, nil, err
	}
	t.step("begin")
	for i, r := range regs {
		n := &Registration{t: t, what: r.what, slot: r.slot, id: r.id}
		if n.programs, err = r.what.programs(t, false); err != nil {
			return begun, lost, err
		}
		e, err := n.begin(r.current.next())
		if err != nil {
			return begun, lost, err
		}
		begun = append(begun, e)
		if i == 0 {
			t.step("install")
		}
		if err := t.maps.Epochs.Put(r.slot, e.m); err != nil {
			return begun, lost, fmt.Errorf("%s: %w", r.name(), err)
		}
	}
	return begun, lost, nil
}

// name is what a device or file of which the path is not known is called.
func (r *Registration) name() string {
	if i, ok := r.what.(inode); ok {
		return i.Label()
	}
	return "device " + r.what.Number()
}

// drainLimit is how long an upgrade waits for bios that are in flight.
const drainLimit = 2 * time.Second

// drain waits until the bios have completed that are in the table of writes in flight now.
func (t *Tracker) drain(limit time.Duration) error {
	places, ranges := make([]uint32, maxInflight), make([]trackerRange, maxInflight)
	var at ebpf.MapBatchCursor
	n, err := t.maps.Inflight.BatchLookup(&at, places, ranges, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("writes in flight: %w", err)
	}
	waiting := map[uint32]trackerRange{}
	for i, p := range places[:n] {
		if ranges[i].Bio != 0 {
			waiting[p] = ranges[i]
		}
	}
	for end := time.Now().Add(limit); len(waiting) > 0 && time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		for p, was := range waiting {
			var now trackerRange
			if err := t.maps.Inflight.Lookup(p, &now); err != nil {
				return fmt.Errorf("writes in flight: %w", err)
			}
			if now != was {
				delete(waiting, p)
			}
		}
	}
	return nil
}

// continueCounts makes a slot's counters, heat and writers go on from old's. They are not
// evidence: an event of this very moment may be counted twice or not.
func (t *Tracker) continueCounts(old *Tracker, slot uint32) error {
	var perCPU []trackerCounters
	if err := old.maps.Counts.Lookup(slot, &perCPU); err != nil {
		return fmt.Errorf("counters: %w", err)
	}
	if err := t.maps.Counts.Put(slot, perCPU); err != nil {
		return fmt.Errorf("counters: %w", err)
	}
	copy(t.heatWords(slot), old.heatWords(slot))
	return old.eachWriter(slot, 0, ^uint64(0), func(k trackerWriterKey, w trackerWriter) error { return t.maps.Writers.Put(k, w) })
}

// retire closes the epochs that are still open in t, which another tracker has replaced,
// and detaches its programs. It tells whether those for image files are detached.
func (t *Tracker) retire() (detached bool, err error) {
	t.devices.all(func(at uint32, p place) bool {
		if err = t.closeEpochs(p.device(), p.slot, blockPrograms{t}); err == nil {
			// While some of its programs are detached and others not, it would see bios complete that
			// it did not see submitted.
			t.devices.remove(at)
		}
		return err == nil
	})
	if err != nil {
		return false, err
	}
	files, err := t.inodes()
	if err != nil {
		return false, err
	}
	t.beginHookChange() // unless upgrade, which did not live to come here, has done it
	for _, f := range files {
		set, err := f.programs(t, false)
		if err != nil {
			continue // closed as lost when it is acquired
		}
		if err := t.closeEpochs(f, f.image.Slot, set); err != nil {
			return false, err
		}
	}
	t.closeHooks()
	t.step("detach")
	return t.unpin()
}

func (t *Tracker) closeEpochs(what Target, slot uint32, set programSet) error {
	all, err := t.pinnedEpochs(slot)
	if err != nil {
		return nil //nolint:nilerr // damaged: said by Acquire
	}
	r := &Registration{t: t, what: what, programs: set, slot: slot}
	for _, e := range all {
		if err == nil && e.hdr(hdrInstance) == set.instanceID() && e.hdr(hdrClosed) == 0 {
			err = r.finish(e)
		}
		e.close()
	}
	return err
}

// device is what the table knows of it.
func (p place) device() Device {
	return Device{
		Major: p.own >> 20, Minor: p.own & (1<<20 - 1), Size: int64(p.sectors) * 512, Partition: !p.whole, Start: int64(p.start) * 512, disk: p.key,
	}
}
