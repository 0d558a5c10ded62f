package bpf

import "time"

// Target is what can be tracked: a [Device] or a [File].
type Target interface {
	// Label is the path, as given.
	Label() string
	// Number is the device number, of a file that of its file system, as mountinfo prints it.
	Number() string

	id() uint64 // in the epoch's header
	shape(shift uint) shape
	changed(since *Epoch) Loss
	lookAgain() (Target, error)
	kernelSectors() (uint64, bool)
	heatShift() uint32
	// settle waits for operations that its programs may not see the end of, because programs were attached
	// or detached meanwhile.
	settle() error

	find(t *Tracker) (slot uint32, ok bool, err error)
	insert(t *Tracker, slot uint32, shift uint) error
	remove(t *Tracker) error
	// programs are those that see its writes, attached first if that is asked for.
	programs(t *Tracker, attach bool) (programSet, error)
}

// programSet is the programs that see the writes to some targets.
type programSet interface {
	names() []string // each is attached copies times
	missed() ([]uint64, error)
	wholeCalls() bool // nobody else runs on a processor while all copies are called
	// vouched tells, a bit for each program, that since they were attached no event was missed by all
	// copies, where that is counted.
	vouched() (uint64, error)
	intact() bool
	instanceID() uint64
	attached() time.Time
	links() []uint32
	changes() uint64                          // see hookChanges; an epoch in which it changes is lost
	present(missed []uint64) []uint64         // of the copies that are attached
	stray(ever []uint64, vouched uint64) bool // see strayLanding
}

// LookupTarget describes the device or the image file at path. Errors wrap ErrNotBlock,
// ErrUntrackable, ErrNoFileHooks or fs.ErrNotExist.
func LookupTarget(path string) (Target, error) {
	if isRegular(path) {
		return LookupFile(path)
	}
	return Lookup(path)
}

// blockPrograms are the tracker's own.
type blockPrograms struct{ t *Tracker }

func (b blockPrograms) names() []string { return programs }

func (b blockPrograms) missed() ([]uint64, error) {
	m, err := b.t.Misses()
	return m[:], err
}

func (b blockPrograms) wholeCalls() bool         { return b.t.wholeCalls() }
func (b blockPrograms) vouched() (uint64, error) { return b.t.vouched() }
func (b blockPrograms) intact() bool             { return b.t.intact() }
func (b blockPrograms) instanceID() uint64       { return b.t.instance }
func (b blockPrograms) attached() time.Time      { return b.t.since }
func (b blockPrograms) links() []uint32          { return b.t.LinkIDs() }
func (b blockPrograms) changes() uint64          { return 0 } // tracepoints call them whatever else is attached

func (b blockPrograms) present(missed []uint64) []uint64 { return b.t.Attached(Misses(missed)) }
func (b blockPrograms) stray(ever []uint64, vouched uint64) bool {
	return strayLanding(ever, b.t.copies, vouched)
}
