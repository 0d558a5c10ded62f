package cbt

import (
	"context"
	"errors"
	"time"
)

// ErrUncounted says that a Source does not see writes.
var ErrUncounted = errors.New("writes to it are not counted")

// Source tells what changed on one disk. Its methods are not safe for
// concurrent use.
type Source interface {
	// Changes closes the current epoch and says what may have changed after
	// the instant named since, up to now. An extent of the delta may be read
	// as soon as Changes has returned. An error means that nothing is known and
	// that the disk must not be read further either, such as when another
	// device has taken its place.
	Changes(ctx context.Context, since ChangeID) (Delta, error)

	// Quiet tells whether nothing was written since the last Changes closed its epoch, without
	// closing another one. If so, what was read after that Changes had returned and before
	// Quiet was called is the disk at the moment when Changes returned; writes that were in flight then may be in it
	// or not. False may also mean that it can't be told. The evidence is set if it is true.
	Quiet() (bool, Evidence, error)

	// Prepare makes the next Changes quicker, so that a guest that is paused for it
	// waits less.
	Prepare() error

	// Commit says that all up to id is durable in a restore point. Until
	// then, what is needed to answer Changes again is kept.
	Commit(id ChangeID) error

	// Writes counts the writes submitted and completed so far, cheaply: as long as
	// it stays the same, nobody wrote. ErrUncounted if they are not seen.
	Writes() (uint64, error)

	// Close lets go of the disk. Tracking goes on.
	Close() error
}

// Delta is the answer of Changes.
type Delta struct {
	ID      ChangeID // the instant up to which it speaks
	Extents Extents  // the whole disk if Unknown is not empty
	Unknown []string // why the extents couldn't be proven to hold every change
	// Evidence is what the judgement rests on.
	Evidence Evidence
	// Writers are the processes that wrote since the ID asked for, as far as is known.
	Writers []Writer
}

// Writer is a process that wrote to a disk. It is there to be named, and proves nothing.
type Writer struct {
	PID     int
	Comm    string
	Kernel  bool   // a kernel thread
	Writes  uint64 // bios that it submitted
	Bytes   uint64 // in them
	Dirtied uint64 // bytes of the device's page cache that it dirtied; a kernel thread submits them later
}

// MethodFile is the Method of an image file whose writes are tracked.
const MethodFile = "ebpf-file"

// Evidence is what a reader needs to judge whether a write can have been missed.
type Evidence struct {
	Method     string    `json:"method"`                // "ebpf", "ebpf-file" or "none"
	Device     string    `json:"device,omitempty"`      // major:minor; of an image file that of its file system
	FileSystem string    `json:"file_system,omitempty"` // of an image file
	Mount      string    `json:"mount,omitempty"`
	Inode      uint64    `json:"inode,omitempty"`
	Handle     string    `json:"handle,omitempty"` // tells the inode from others that have or had its number
	Opened     time.Time `json:"opened,omitzero"`
	Closed     time.Time `json:"closed,omitzero"` // of an epoch in which nothing was written so far: when that was seen
	FirstEpoch uint64    `json:"first_epoch,omitempty"`
	LastEpoch  uint64    `json:"last_epoch,omitempty"`
	Granule    int64     `json:"granule,omitempty"` // bytes
	Size       int64     `json:"size,omitempty"`    // bytes
	DiskSeq    uint64    `json:"diskseq,omitempty"`
	Dirty      uint64    `json:"dirty_granules"`
	Sectors    uint64    `json:"sectors_written"` // as submitted, 512 bytes each
	Landed     uint64    `json:"sectors_completed"`
	// KernelSectors is what the kernel's own statistics counted meanwhile, nil if they are turned
	// off. More than was submitted and completed makes the epoch unknown.
	KernelSectors *uint64 `json:"kernel_sectors,omitempty"`
	// Earlier tells that part of it was marked by programs of another version, or by fewer copies, before
	// an upgrade. They were attached to the end of their epochs; LinkIDs and Attached are those of now.
	Earlier bool `json:"earlier_programs,omitempty"`
	// SavedState tells that the first epoch began in an earlier boot, and why it is believed.
	SavedState  string    `json:"saved_state,omitempty"`
	BootID      string    `json:"boot_id,omitempty"`
	Attached    time.Time `json:"attached,omitzero"`
	Programs    []string  `json:"programs,omitempty"`     // in the order of LeastMisses
	LinkIDs     []uint32  `json:"link_ids,omitempty"`     // of each program and copy that is attached
	LeastMisses []uint64  `json:"least_misses,omitempty"` // per program, events that every copy may have missed: all 0 or the epoch is unknown
	Missed      []uint64  `json:"missed,omitempty"`       // of an audit: per program and copy that is attached, in the current epoch
}
