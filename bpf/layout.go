package bpf

// The same numbers stand in layout.h; TestLayoutMatchesHeader compares them.
const (
	layoutVersion  = 7
	maxDevices     = 256
	places         = 1024
	probes         = 16
	placeFree      = 0
	placeGone      = 1
	maxInflight    = 131072
	inflightProbes = 8
	maxDiscards    = 1024
	maxCalls       = 32768
	callProbes     = 8
	maxWriters     = 8192
	heatRegions    = 1024
	copies         = 3 // of each program, at most
	headerWords    = 256
	hostWords      = 8
	hdrTaint       = 0
	hdrNumber      = hdrLast
)

// Words of an epoch's header that belong to userspace.
const (
	hdrMagic    = 1
	hdrShift    = 2
	hdrGranules = 3
	hdrSize     = 4
	hdrDev      = 5 // of the partition, if it is one
	hdrDiskSeq  = 6
	hdrID       = 7 // and 8
	hdrFirst    = 9
	hdrLast     = 10
	hdrClosed   = 11 // 1: the losses below are those of the whole epoch
	hdrOpenedAt = 12
	hdrClosedAt = 13
	hdrLoss     = 14
	hdrHostBase = 15 // and 16: hostNoEpoch, hostPassthrough when opened
	hdrSectors  = 17 // at close: sectors submitted while open
	hdrLanded   = 18 // likewise: completed
	hdrKernel   = 19 // likewise: counted by the kernel's own statistics
	hdrBase     = 20 // and 2 more: the counts of the three when opened
	hdrInstance = 44
	hdrTracked  = 45  // when the device was registered
	hdrCounting = 46  // 1: hdrKernel is known
	hdrTable    = 47  // hash of the device-mapper table
	hdrStart    = 48  // of a partition, sectors
	hdrSaved    = 49  // 0, or how an epoch of another boot is known to be complete: SavedProven, SavedTrusted
	hdrSavedIn  = 50  // and 51: that boot
	hdrPrograms = 52  // words used of each of the following
	hdrVouched  = 53  // at close, a bit per program: none of its events was missed by every copy
	hdrHooks    = 54  // hostHooks, when opened
	hdrMissBase = 64  // one word per program and copy, when opened
	hdrMissed   = 128 // likewise, at close: missed while open
)

const headerMagic = 0x5449_4445_4550_0000 | layoutVersion // "TIDEP"

// Words of the host map.
const (
	hostNoEpoch     = 0
	hostPassthrough = 1
	hostWriters     = 2
	hostHooks       = 3 // userspace's own, see hookchange.go
	hostNVMeOps     = 4 // and 3 more
)

// Words of the call_counts map: two for each of the programs, in their order, then one.
const (
	callWords    = 16
	callsBefore  = 8
	callsUnnoted = 0
	callsRescued = 1
)

// Broken makes a tracker that loses writes, so that a test can see that it would
// notice. For tests only.
type Broken uint32

// Bits of Broken.
const (
	BrokenNoSubmit    Broken = 1 << iota // submissions don't mark
	BrokenNoComplete                     // completions don't mark
	BrokenBlind                          // the programs see nothing
	BrokenNoWriteback                    // image files: writeback doesn't mark
	BrokenNoDirect                       // image files: the end of direct I/O doesn't mark
)

// Taint says why an epoch's bitmap may lack a write: bits set while it is open, by the programs but
// for TaintAudit.
type Taint uint64

// Bits of Taint.
const (
	TaintRange Taint = 1 << iota
	TaintBitmap
	TaintInflight
	TaintPassthrough
	TaintOpcode
	TaintDiscards
	TaintUnseen
	TaintIoctl
	TaintUnmount
	TaintFolio

	// TaintAudit is set by userspace, see [Registration.Taint].
	TaintAudit Taint = 1 << 30
)

// Loss says why an epoch's bitmap may lack a write: found when it was closed.
type Loss uint64

// Bits of Loss.
const (
	LossMissed      Loss = 1 << iota // every copy of a program missed an event
	LossDetached                     // a link was not the one it was when the epoch began
	LossHost                         // a loss that could not be blamed on a device
	LossReplaced                     // another diskseq under the same number
	LossResized                      // the device's size changed
	LossPassthrough                  // a passthrough command on a queue shared by several devices
	LossUncounted                    // the kernel counted more written sectors than the programs saw
	LossTable                        // another device-mapper table
	LossHooks                        // image files: programs were attached to its file system's functions, or detached
)

var taintText = map[Taint]string{
	TaintRange:       "a write beyond the size the device had",
	TaintBitmap:      "a bit of the bitmap could not be set",
	TaintInflight:    "the table of writes in flight was full",
	TaintPassthrough: "a passthrough command bypassed the block layer's bios",
	TaintOpcode:      "an operation whose range is not known (zone append or reset)",
	TaintDiscards:    "a request with too many discards",
	TaintUnseen:      "a write completed that began before tracking did, or was passed on by another device",
	TaintIoctl:       "a request to the file system that may have changed the image file (ioctl)",
	TaintUnmount:     "the image file's file system was unmounted",
	TaintFolio:       "a page of unknown size was written back",
	TaintAudit:       "an audit found a change that was not recorded",
}

var lossText = map[Loss]string{
	LossMissed:      "the kernel dropped tracing events (recursion misses in every copy of a program)",
	LossDetached:    "a tracking program was detached",
	LossHost:        "an event found no epoch",
	LossReplaced:    "another device has taken the same number, or another file the same name (diskseq changed, or inode)",
	LossResized:     "it was resized or moved",
	LossPassthrough: "a passthrough command on a controller's queue may have written to any of its devices",
	LossUncounted:   "the kernel counted more written sectors than the tracker saw",
	LossTable:       "the device-mapper table was replaced",
	LossHooks:       "tracking programs of image files were replaced, attached or detached, and the kernel does not tell these of the end of what was under way then",
}

// Reasons says each bit in words, for a person.
func (t Taint) Reasons() []string { return reasons(t, taintText, "an unknown taint") }

// Reasons says each bit in words, for a person.
func (l Loss) Reasons() []string { return reasons(l, lossText, "an unknown loss") }

func reasons[T ~uint64](v T, text map[T]string, unknown string) []string {
	var out []string
	for ; v != 0; v &= v - 1 {
		why, ok := text[v&-v]
		if !ok {
			why = unknown
		}
		out = append(out, why)
	}
	return out
}
