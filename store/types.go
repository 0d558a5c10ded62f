package store

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

// DefaultGrain is the size of a grain in bytes unless a disk says otherwise.
const DefaultGrain = 64 << 10

// MinGrain and MaxGrain bound the size of a grain in bytes; it is a power of
// two.
const (
	MinGrain = 4 << 10
	MaxGrain = 1 << 20
)

// Hash is a BLAKE3-256 digest, keyed in an encrypted repository.
type Hash [32]byte

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText writes 64 hex digits.
func (h Hash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText reads 64 hex digits.
func (h *Hash) UnmarshalText(p []byte) error { return decodeHex(h[:], p) }

// PackID names a pack. It is random: a pack that was compacted keeps it.
type PackID [16]byte

func (p PackID) String() string { return hex.EncodeToString(p[:]) }

// MarshalText writes 32 hex digits.
func (p PackID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, p[:]), nil }

// UnmarshalText reads 32 hex digits.
func (p *PackID) UnmarshalText(b []byte) error { return decodeHex(p[:], b) }

func decodeHex(dst, src []byte) error {
	if len(src) != 2*len(dst) {
		return fmt.Errorf("%d hex digits, want %d", len(src), 2*len(dst))
	}
	_, err := hex.Decode(dst, src)
	return err
}

// Ref says what a grain or map node is and where it lies.
// The zero Ref stands for a run of zeroes, of which nothing is stored.
type Ref struct {
	Hash Hash   `json:"hash"`
	Pack PackID `json:"pack"`
	Ord  uint32 `json:"ord"` // ordinal within the pack
}

// IsZero tells whether r stands for zeroes.
func (r Ref) IsZero() bool { return r == Ref{} }

// Root is one disk of a point: the root of its map and its shape.
type Root struct {
	Ref   Ref   `json:"ref,omitzero"`
	Level uint8 `json:"level"` // height of the tree: 0 means that Ref is a leaf node
	Size  int64 `json:"size"`  // of the disk, in bytes
	Grain int   `json:"grain"` // in bytes: a power of two, 4 KiB to 1 MiB
}

// Consistency says which instant of the disk a point shows.
type Consistency string

// The kinds of consistency. A point that is None is not offered for boot
// unless asked for by name.
const (
	Crash      Consistency = "crash"      // one instant of the disk
	Filesystem Consistency = "filesystem" // the guest was frozen by its own agent
	None       Consistency = "none"       // read while it was written
)

// ErrNotFound is wrapped by the errors of all look-ups that found nothing.
var ErrNotFound = blob.ErrNotFound

// ErrExists is wrapped when something to be created is there already.
var ErrExists = blob.ErrExists

// ErrLocked is wrapped when another process writes for the same VM.
var ErrLocked = blob.ErrLocked

// ErrCorrupt is wrapped by a [CorruptError].
var ErrCorrupt = errors.New("corrupt")

// ErrNotRepository is wrapped when there is no repository at the place named.
var ErrNotRepository = errors.New("not a tidemark repository")

// ErrVersion is wrapped when a format version is newer than this program.
var ErrVersion = errors.New("unknown format version")

// ErrAmbiguous is wrapped by [Repo.Find] when an ID prefix fits several points.
var ErrAmbiguous = errors.New("ambiguous")

// ErrInvalid is wrapped when an argument breaks the rules of a call: a name, a
// size, an offset, a call after the end.
var ErrInvalid = errors.New("invalid")

// CorruptError says that stored bytes are not what was written.
// errors.Is(err, ErrCorrupt) holds for it.
type CorruptError struct {
	Object string // name of the object in the repository
	What   string // what was found, for a person
}

func (e *CorruptError) Error() string { return fmt.Sprintf("%s: corrupt: %s", e.Object, e.What) }

// Unwrap lets errors.Is find ErrCorrupt.
func (e *CorruptError) Unwrap() error { return ErrCorrupt }

// Point is a restore point: immutable once published.
type Point struct {
	ID          string          `json:"id"` // set when published or read; not part of the document
	VM          string          `json:"vm"`
	Time        time.Time       `json:"time"` // the instant that the disks show, UTC
	Parent      string          `json:"parent,omitempty"`
	Consistency Consistency     `json:"consistency"`
	Quiesce     Quiesce         `json:"quiesce"`
	Disks       []Disk          `json:"disks"`
	Config      json.RawMessage `json:"config,omitempty"` // the VM's configuration, see package vm
	Tool        string          `json:"tool"`             // name and version of the writer

	// Origin is what the point was made from, if not from a disk: the same content for a copy; what
	// could be saved of it for one that says what is lost.
	Origin *Origin `json:"origin,omitempty"`
}

// Origin names a point, perhaps of another repository.
type Origin struct {
	Repository string `json:"repository"` // its ID
	Point      string `json:"point"`      // its ID
}

// Name returns the name under which p is listed.
func (p *Point) Name() PointName { return PointName{VM: p.VM, ID: p.ID, Time: p.Time} }

// Quiesce says how the point's instant was reached.
type Quiesce struct {
	Method string        `json:"method"` // "qmp", "freeze", "quiet", "none", ...
	Rounds int           `json:"rounds"`
	Paused time.Duration `json:"paused_ns"`
}

// Disk is one disk of a point.
type Disk struct {
	Name     string   `json:"name"`   // "disk0", ...
	Source   string   `json:"source"` // the device it was read from
	Root     Root     `json:"root"`
	ChangeID string   `json:"change_id,omitempty"` // opaque here; the tracker's word for this instant
	Tracking Tracking `json:"tracking"`
	Stats    Stats    `json:"stats"`
}

// Tracking says how it was decided what to read.
type Tracking struct {
	// Mode is "full" (first point), "tracked" (the tracker proved what changed)
	// or "compare" (the whole disk was read and compared with the parent).
	Mode string `json:"mode"`
	// Reasons say why it is not "tracked", or what was read although it had not changed.
	Reasons []string `json:"reasons,omitempty"`
	// Resumed is when the checkpoint was made from which an interrupted backup went on; zero if it was
	// made in one go. Mode and reasons are those of the whole.
	Resumed time.Time `json:"resumed,omitzero"`
	// Evidence is the tracker's proof, opaque here.
	Evidence json.RawMessage `json:"evidence,omitempty"`
	// Writers are the processes that wrote since the parent, as far as is known.
	Writers []WrittenBy `json:"writers,omitempty"`
}

// WrittenBy is a process that wrote to a disk. It is named, and proves nothing.
type WrittenBy struct {
	PID     int    `json:"pid"`
	Comm    string `json:"comm"`
	Role    string `json:"role"`    // WriterVM, WriterKernel or WriterOther
	Writes  uint64 `json:"writes"`  // submitted
	Bytes   uint64 `json:"bytes"`   // submitted
	Dirtied uint64 `json:"dirtied"` // bytes of the disk's page cache on the host, which the kernel submits later
}

// Roles of a WrittenBy.
const (
	WriterVM     = "vm"     // runs the VM
	WriterKernel = "kernel" // writes the host's page cache back
	WriterOther  = "other"
)

// Stats are the costs of one disk of a point, in bytes.
type Stats struct {
	Changed int64 `json:"changed"` // content that differs from the parent
	Read    int64 `json:"read"`    // read from the source
	New     int64 `json:"new"`     // grains not in the repository before, uncompressed
	Stored  int64 `json:"stored"`  // written to packs, data and map, without the padding of encrypted ones
}
