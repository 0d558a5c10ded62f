package bpf

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// programs are the tracepoint programs, each of which is attached copies times at most.
var programs = []string{"bio_queue", "rq_complete", "bio_complete"}

// Misses counts, per program and copy, the events the kernel did not give it:
// index program*copies + copy, programs in the order of [ProgramNames]. A copy that is not
// attached has missed what the first one has.
type Misses [9]uint64

// ProgramNames are the tracking programs in the order of Misses.
func ProgramNames() []string { return append([]string(nil), programs...) }

// Options of Open.
type Options struct {
	// Dir is the directory in bpffs; DefaultDir if empty.
	Dir string
	// AdoptOnly makes Open fail with ErrNotAttached where it would attach; with ErrUnusable too, if there
	// is something that it would replace.
	AdoptOnly bool
	// Copies of each program to attach, 1 to 3; 0 in all other use than tests: one until it
	// has missed an event.
	Copies int
	// Broken loads programs that lose writes. Zero in all other use than tests.
	Broken Broken
	// Misses replaces the reading of the kernel's counters: the seam
	// through which a test makes an event be lost. Nil in all other use.
	Misses func(kernel Misses) Misses
	// FileMisses does the same for the programs that see image files.
	FileMisses func(kernel []uint64) []uint64
	// Variant makes the programs count as another version of themselves. Zero in all
	// other use than tests.
	Variant uint32
	// Preemptible makes the tracker do what it does on kernels that preempt tracepoints. False in all other
	// use than tests.
	Preemptible bool
	// Step is called before each step of an upgrade, with its name, so that a test can die
	// there. Nil in all other use.
	Step func(step string)
}

// Tracker is the set of programs attached on this host. Its methods are safe
// for concurrent use, also by several processes.
type Tracker struct {
	dir      string
	gen      uint64 // generation, see generation.go
	maps     trackerMaps
	meta     *ebpf.Map
	links    [9]link.Link
	progs    [9]*ebpf.Program
	hostMap  *mapping
	heatMap  *mapping
	calls    *mapping // the call_counts map
	devices  table
	options  Options
	object   uint64 // hash of what is attached
	instance uint64
	linkIDs  [9]uint32
	copies   int // attached of each program
	grown    string
	since    time.Time
	fresh    string
	began    string
	outdated string

	mu        sync.Mutex
	open      map[*Registration]struct{}
	files     *ebpf.Map             // of tracked image files, nil if there never was one
	fileHooks map[string]*fileHooks // by file system
}

// Words of the meta map.
const (
	metaMagic    = 0
	metaInstance = 1
	metaBoot     = 2 // and 3
	metaSince    = 4
	metaLinks    = 5  // 9 words
	metaObject   = 17 // hash of the object that was loaded
	metaCopies   = 18 // attached of each program; 0, of versions that knew no other number: all
	metaWords    = 32
	metaWhy      = metaWords // why it was attached: text, ended by a zero
	metaWhyWords = 64
	metaGrown    = metaWhy + metaWhyWords // likewise why there is more than one copy
	metaEnd      = metaGrown + 32
)

// Open adopts the tracker that is pinned, or attaches a new one if there is
// none, or if what is pinned can't be trusted: then every device has to be
// registered again. If only its programs are of another version than this binary's, they are
// replaced without a gap, see [Tracker.Outdated]; by more copies, if the only copy of one has missed
// an event. It needs root. Errors wrap ErrPermission, ErrNoBTF, ErrOldKernel, or ErrBusy while another process uses what can't be adopted.
func Open(o Options) (*Tracker, error) {
	if o.Dir == "" {
		o.Dir = DefaultDir
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		return nil, ErrNoBTF
	}
	if kernelBefore(5, 17) {
		// It would be refused anyway, by a verifier that does not say why.
		return nil, ErrOldKernel
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("tracking writes: %w", ErrPermission)
	}
	// Kernels before 5.11 charge BPF memory to RLIMIT_MEMLOCK.
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("lift the memlock limit: %w", err)
	}
	if _, err := os.Stat(o.Dir); err != nil && o.AdoptOnly {
		return nil, ErrNotAttached
	}
	lock, err := openDir(o.Dir)
	if err != nil {
		return nil, permission(err)
	}
	defer func() { _ = lock.Close() }()

	t := newTracker(o, 0)
	err = t.adopt()
	if err == nil {
		n, why, err := t.grow()
		if err != nil {
			t.closeAll()
			return nil, err
		}
		if t.object == objectHash(o, n) {
			return t, nil
		}
		if o.AdoptOnly {
			t.outdated = "the tracker's programs are of another version: the next backup replaces them"
			if n > t.copies {
				t.outdated = "a tracking program of which there is one copy has missed events: the next backup attaches more copies"
			}
			return t, nil
		}
		return t.upgrade(n, why)
	}
	t.closeAll()
	var not notAdoptable
	if !errors.As(err, &not) {
		// Such as too many open files: what is pinned may be good.
		return nil, permission(fmt.Errorf("adopt the pinned tracker: %w", err))
	}
	if o.AdoptOnly {
		return nil, unusable(o.Dir, not)
	}
	t.fresh = not.Error()
	if err := t.replace(); err != nil {
		t.closeAll()
		return nil, permission(err)
	}
	return t, nil
}

// replace attaches the tracker where one was that can't be adopted.
func (t *Tracker) replace() error {
	// A process that is using it would lose its epochs under its hands.
	locks, err := lockSlots(t.dir)
	defer locks.close()
	if err != nil {
		return fmt.Errorf("attach the tracker anew, because %s: %w", t.fresh, err)
	}
	detached, err := clearTracker(t.dir)
	if err != nil {
		return err
	}
	t.gen, t.copies = 1, max(t.copies, firstCopies(t.options, t.wholeCalls()))
	if err := t.buildWhole(); err != nil {
		return fmt.Errorf("attach the tracker: %w", err)
	}
	if !detached {
		t.beginHookChange()
	}
	return t.publish(t.fresh)
}

func newTracker(o Options, gen uint64) *Tracker {
	return &Tracker{dir: o.Dir, gen: gen, options: o, open: map[*Registration]struct{}{}, fileHooks: map[string]*fileHooks{}}
}

func permission(err error) error {
	if errors.Is(err, os.ErrPermission) && os.Geteuid() != 0 {
		return fmt.Errorf("%w: %w", ErrPermission, err)
	}
	return err
}

// Fresh says why nothing was adopted, or is empty if the pinned tracker was.
func (t *Tracker) Fresh() string { return t.fresh }

// Began says why the tracker was attached anew, by this process or an earlier one: devices
// that were tracked before that have to be registered again.
func (t *Tracker) Began() string { return t.began }

// Outdated says why programs of another version, or too few copies, are still in use, or is empty. They
// are as good: a version whose programs may not be believed any more has another layout, and what
// the copies there are have missed is known.
func (t *Tracker) Outdated() string { return t.outdated }

// Since is when the programs were attached.
func (t *Tracker) Since() time.Time { return t.since }

// BootID is the boot of this host, in hex.
func BootID() (string, error) {
	id, err := bootID()
	return hex.EncodeToString(id[:]), err
}

// LinkIDs are the kernel's IDs of the links that are attached, in the order of Misses.
func (t *Tracker) LinkIDs() []uint32 {
	var out []uint32
	t.each(func(i int) bool { out = append(out, t.linkIDs[i]); return true })
	return out
}

// Close releases this process' descriptors. Tracking goes on.
func (t *Tracker) Close() error {
	t.mu.Lock()
	regs := make([]*Registration, 0, len(t.open))
	for r := range t.open {
		regs = append(regs, r)
	}
	t.mu.Unlock()
	errs := make([]error, 0, len(regs))
	for _, r := range regs {
		errs = append(errs, r.Close())
	}
	t.closeAll()
	return errors.Join(errs...)
}

func (t *Tracker) closeAll() {
	for _, m := range []**mapping{&t.hostMap, &t.heatMap, &t.calls, &t.devices.mem} {
		if *m != nil {
			(*m).close()
			*m = nil
		}
	}
	for i := range t.links {
		if t.links[i] != nil {
			_ = t.links[i].Close()
			t.links[i] = nil
		}
		if t.progs[i] != nil {
			_ = t.progs[i].Close()
			t.progs[i] = nil
		}
	}
	t.closeHooks()
	if t.files != nil {
		_ = t.files.Close()
		t.files = nil
	}
	_ = t.maps.Close()
	t.maps = trackerMaps{}
	if t.meta != nil {
		_ = t.meta.Close()
		t.meta = nil
	}
}

// closeHooks lets go of the programs for image files.
func (t *Tracker) closeHooks() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range t.fileHooks {
		h.close()
	}
	clear(t.fileHooks)
}

// Remove detaches every program and forgets every device on this host. It
// fails with ErrBusy while a device is in use.
func Remove(dir string) error {
	if dir == "" {
		dir = DefaultDir
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	lock, err := lockDir(dir, unix.LOCK_EX)
	if err != nil {
		return permission(err)
	}
	defer func() { _ = lock.Close() }()
	locks, err := lockSlots(dir)
	defer locks.close()
	if err != nil {
		return err
	}
	if _, err := clearTracker(dir); err != nil {
		return err
	}
	return os.Remove(dir)
}

// clearTracker removes all pins below dir, and tells whether the programs for image files are detached.
func clearTracker(dir string) (detached bool, err error) {
	return unpinHooks(filepath.Join(dir, generationPrefix+"*/files-*/link-*"), detachLimit, func() error { return clearDir(dir) })
}

// mapNames are the pinned maps by their name in tracker.bpf.c.
func (t *Tracker) mapNames() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		"devices": &t.maps.Devices, "epochs": &t.maps.Epochs, "inflight": &t.maps.Inflight,
		"counts": &t.maps.Counts, "host": &t.maps.Host, "heat": &t.maps.Heat, "writers": &t.maps.Writers,
		"calls": &t.maps.Calls, "call_counts": &t.maps.CallCounts,
	}
}

func programName(i int) string { return fmt.Sprintf("%s_%d", programs[i/copies], i%copies) }

// notAdoptable says why what is pinned can't be believed.
type notAdoptable string

func (n notAdoptable) Error() string { return string(n) }

// unusable tells a directory without anything in it from one that holds what can't be adopted.
func unusable(dir string, why notAdoptable) error {
	if entries, err := os.ReadDir(dir); err == nil && len(entries) == 0 {
		return fmt.Errorf("%w: %w", ErrNotAttached, why)
	}
	return unusableError{dir, why}
}

type unusableError struct {
	dir string
	why notAdoptable
}

func (u unusableError) Error() string { return fmt.Sprintf("%v (%s): %v", ErrUnusable, u.dir, u.why) }

func (u unusableError) Is(target error) bool {
	return target == ErrUnusable || target == ErrNotAttached
}

func (u unusableError) Unwrap() error { return u.why }

// objectHash tells one version of the programs from another, and one number of copies.
func objectHash(o Options, copies int) uint64 {
	var seams [12]byte
	binary.BigEndian.PutUint32(seams[:], uint32(o.Broken))
	binary.BigEndian.PutUint32(seams[4:], o.Variant)
	binary.BigEndian.PutUint32(seams[8:], uint32(copies))
	h := sha256.Sum256(slices.Concat(seams[:], _TrackerBytes, _FilesBytes))
	return binary.BigEndian.Uint64(h[:])
}

// load reads the pins of the tracker's generation.
func (t *Tracker) load() error {
	var err error
	t.meta, err = ebpf.LoadPinnedMap(t.pin(pinMeta), nil)
	if err != nil {
		return err
	}
	m, err := mapArray(t.meta)
	if err != nil {
		return err
	}
	defer m.close()
	boot, err := bootID()
	if err != nil {
		return err
	}
	switch {
	case len(m.words) < metaWords || m.words[metaMagic] != headerMagic:
		return otherLayout(m.words)
	case m.words[metaBoot] != binary.BigEndian.Uint64(boot[:8]) || m.words[metaBoot+1] != binary.BigEndian.Uint64(boot[8:]):
		return notAdoptable("the pinned tracker is of another boot")
	}
	t.object = m.words[metaObject]
	t.began = textOf(m.words[min(metaWhy, len(m.words)):min(metaGrown, len(m.words))])
	t.grown = textOf(m.words[min(metaGrown, len(m.words)):])
	switch n := m.words[metaCopies]; {
	case n > copies:
		return notAdoptable("the pinned tracker has another map layout")
	case n == 0:
		t.copies = copies
	default:
		t.copies = int(n)
	}
	t.instance = m.words[metaInstance]
	t.since = time.Unix(0, int64(m.words[metaSince]))
	for name, p := range t.mapNames() {
		*p, err = ebpf.LoadPinnedMap(t.pin("map-"+name), nil)
		if errors.Is(err, os.ErrNotExist) {
			return notAdoptable("map " + name + " is not pinned any more")
		}
		if err != nil {
			return fmt.Errorf("map %s: %w", name, err)
		}
	}
	t.each(func(i int) bool {
		t.linkIDs[i] = uint32(m.words[metaLinks+i])
		err = t.loadLink(i)
		return err == nil
	})
	if err != nil {
		return err
	}
	return t.mapShared()
}

// otherLayout says which one, if the meta map does.
func otherLayout(meta []uint64) error {
	const number = 1<<16 - 1
	if len(meta) > metaMagic && meta[metaMagic]&^number == headerMagic&^number {
		return notAdoptable(fmt.Sprintf("the pinned tracker has another map layout: version %d, this binary's is %d", meta[metaMagic]&number, layoutVersion))
	}
	return notAdoptable("the pinned tracker has another map layout")
}

// loadLink finds the pinned link of program i to be the one with the ID that was written down.
func (t *Tracker) loadLink(i int) error {
	var err error
	t.links[i], err = link.LoadPinnedLink(t.pin("link-"+programName(i)), nil)
	if errors.Is(err, os.ErrNotExist) {
		return notAdoptable("program " + programName(i) + " was detached")
	}
	if err != nil {
		return fmt.Errorf("link of %s: %w", programName(i), err)
	}
	info, err := t.links[i].Info()
	if err != nil {
		return fmt.Errorf("link of %s: %w", programName(i), err)
	}
	if uint32(info.ID) != t.linkIDs[i] {
		return notAdoptable("program " + programName(i) + " was detached and attached again")
	}
	if t.progs[i], err = ebpf.NewProgramFromID(info.Program); err != nil {
		return fmt.Errorf("program %s: %w", programName(i), err)
	}
	return nil
}

// mapShared maps what is shared with the programs.
func (t *Tracker) mapShared() error {
	var err error
	if t.hostMap, err = mapArray(t.maps.Host); err != nil {
		return err
	}
	if t.heatMap, err = mapArray(t.maps.Heat); err != nil {
		return err
	}
	if t.calls, err = mapArray(t.maps.CallCounts); err != nil {
		return err
	}
	t.devices, err = mapTable(t.maps.Devices)
	return err
}

// attachTries is how often programs are attached until no event was missed by all copies meanwhile.
const attachTries = 5

// buildWhole is build. Where calls are noted, what the first copy misses just when others come is rescued by none: such
// a tracker could never vouch for anything, so another one is built.
func (t *Tracker) buildWhole() error {
	for try := 1; ; try++ {
		if err := t.build(); err != nil || t.wholeCalls() || t.copies == 1 || try == attachTries {
			return err
		}
		vouched, err := t.vouched()
		if err != nil || vouched == 1<<len(programs)-1 {
			return err
		}
		t.closeAll()
		if _, err := t.unpin(); err != nil {
			return err
		}
	}
}

// build attaches the programs with maps of their own, and pins all but what makes others
// adopt it.
func (t *Tracker) build() error {
	if err := os.Mkdir(t.pin(""), 0o700); err != nil {
		return err
	}
	spec, err := trackerSpec()
	if err != nil {
		return err
	}
	addr, err := kernelSymbol("bio_chain_endio")
	if err != nil {
		return err
	}
	if err := spec.Variables["chain_endio"].Set(addr); err != nil {
		return fmt.Errorf("set the address of bio_chain_endio: %w", err)
	}
	if err := spec.Variables["broken"].Set(uint32(t.options.Broken)); err != nil {
		return fmt.Errorf("set broken: %w", err)
	}
	if err := spec.Variables["copies"].Set(uint32(t.copies)); err != nil {
		return fmt.Errorf("set copies: %w", err)
	}
	if t.wholeCalls() {
		spec.Maps["calls"].MaxEntries = 1
	} else if err := spec.Variables["preemptible"].Set(uint32(1)); err != nil {
		return fmt.Errorf("set preemptible: %w", err)
	}
	for i := range t.progs {
		if i%copies >= t.copies {
			delete(spec.Programs, programName(i))
		}
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer coll.Close()
	for name, p := range t.mapNames() {
		*p = coll.DetachMap(name)
		if *p == nil {
			return fmt.Errorf("the embedded object has no map %s", name)
		}
		if err := (*p).Pin(t.pin("map-" + name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	// In order of copies: the last copy of an event drops what the others need.
	for c := range t.copies {
		for p := range programs {
			if c == 1 {
				if err := t.countBefore(p); err != nil {
					return err
				}
			}
			if err := t.attachProgram(coll, p*copies+c); err != nil {
				return err
			}
		}
	}
	if err := t.attachWriters(coll); err != nil {
		return err
	}
	t.instance, t.since, t.object = random64(), time.Now(), objectHash(t.options, t.copies)
	return t.mapShared()
}

// publish pins meta: with it the tracker is complete, without it nobody adopts the rest.
func (t *Tracker) publish(why string) error {
	var err error
	t.meta, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "tidemark_meta", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: metaEnd, Flags: unix.BPF_F_MMAPABLE,
	})
	if err != nil {
		return fmt.Errorf("meta map: %w", err)
	}
	m, err := mapArray(t.meta)
	if err != nil {
		return err
	}
	defer m.close()
	boot, err := bootID()
	if err != nil {
		return err
	}
	m.words[metaBoot] = binary.BigEndian.Uint64(boot[:8])
	m.words[metaBoot+1] = binary.BigEndian.Uint64(boot[8:])
	m.words[metaInstance] = t.instance
	m.words[metaObject] = t.object
	m.words[metaSince] = uint64(t.since.UnixNano())
	for i, id := range t.linkIDs {
		m.words[metaLinks+i] = uint64(id)
	}
	m.words[metaCopies] = uint64(t.copies)
	putText(m.words[metaWhy:metaGrown], why)
	putText(m.words[metaGrown:metaEnd], t.grown)
	t.began = why
	m.words[metaMagic] = headerMagic
	if err := t.meta.Pin(t.pin(pinMeta)); err != nil {
		return fmt.Errorf("pin meta: %w", err)
	}
	return nil
}

// The program that names who dirties the page cache, and what it is attached to. It marks
// nothing, and kernels before 5.19 lack the tracepoint.
const (
	programNamesWriters = "dirty_folio"
	namesWriters        = "writeback_dirty_folio"
)

// trackerSpec is the embedded object without what this kernel has no tracepoint for.
func trackerSpec() (*ebpf.CollectionSpec, error) {
	spec, err := loadTracker()
	if err != nil {
		return nil, fmt.Errorf("read the embedded object: %w", err)
	}
	if !hasTracepoint(namesWriters) {
		delete(spec.Programs, programNamesWriters)
	}
	return spec, nil
}

func (t *Tracker) attachWriters(coll *ebpf.Collection) error {
	p := coll.DetachProgram(programNamesWriters)
	if p == nil {
		return nil
	}
	defer func() { _ = p.Close() }()
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		return fmt.Errorf("attach %s: %w", programNamesWriters, err)
	}
	defer func() { _ = l.Close() }()
	return l.Pin(t.pin("link-" + programNamesWriters))
}

func (t *Tracker) attachProgram(coll *ebpf.Collection, i int) error {
	name := programName(i)
	t.progs[i] = coll.DetachProgram(name)
	if t.progs[i] == nil {
		return fmt.Errorf("the embedded object has no program %s", name)
	}
	l, err := link.AttachTracing(link.TracingOptions{Program: t.progs[i]})
	if err != nil {
		return fmt.Errorf("attach %s: %w", name, err)
	}
	t.links[i] = l
	if err := l.Pin(t.pin("link-" + name)); err != nil {
		return fmt.Errorf("pin link of %s: %w", name, err)
	}
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("link of %s: %w", name, err)
	}
	t.linkIDs[i] = uint32(info.ID)
	return nil
}

// intact tells whether every link that was adopted is still the pinned one.
// A link whose pin was removed lives only as long as this process.
func (t *Tracker) intact() bool {
	intact := true
	t.each(func(i int) bool {
		l, err := link.LoadPinnedLink(t.pin("link-"+programName(i)), nil)
		if err != nil {
			intact = false
			return false
		}
		info, err := l.Info()
		_ = l.Close()
		intact = err == nil && uint32(info.ID) == t.linkIDs[i]
		return intact
	})
	return intact
}

// Misses are the events each program has missed since it was attached
// (bpf_prog_info.recursion_misses).
func (t *Tracker) Misses() (m Misses, err error) {
	t.each(func(i int) bool {
		var s *ebpf.ProgramStats
		if s, err = t.progs[i].Stats(); err != nil {
			err = fmt.Errorf("statistics of %s: %w", programName(i), err)
			return false
		}
		m[i] = s.RecursionMisses
		return true
	})
	if err != nil {
		return m, err
	}
	if t.options.Misses != nil {
		m = t.options.Misses(m)
	}
	m.fill(t.copies)
	return m, nil
}

func random64() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return binary.LittleEndian.Uint64(b[:])
}

// slotDir is where the epochs of one slot are pinned.
func (t *Tracker) slotDir(slot uint32) string {
	return filepath.Join(t.dir, fmt.Sprintf("dev-%d", slot))
}
