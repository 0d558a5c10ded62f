package vm

import (
	"context"
	"errors"
)

var (
	// ErrUnsupported is wrapped when a hypervisor, or its driver, cannot express
	// something.
	ErrUnsupported = errors.New("not supported by the hypervisor")

	// ErrNotDefined is wrapped when there is no machine of that name.
	ErrNotDefined = errors.New("VM is not defined")

	// ErrRunning is wrapped when something needs a machine to be off.
	ErrRunning = errors.New("VM is running")
)

// State of a machine.
type State string

// States. Failed means that the machine is there but cannot go on: its guest
// panicked, or a disk failed.
const (
	Off     State = "off"
	Running State = "running"
	Paused  State = "paused"
	Failed  State = "failed"
)

// Backing says where the bytes of a disk are. Exactly one of NBD, Device and File is
// set. The hypervisor must have it for itself alone while the machine runs.
type Backing struct {
	NBD      string `json:"nbd,omitempty"`    // unix socket of an NBD server
	Export   string `json:"export,omitempty"` // name of the NBD export, may be empty
	Device   string `json:"device,omitempty"` // block device of the host
	File     string `json:"file,omitempty"`   // raw image file of the host
	ReadOnly bool   `json:"read_only,omitempty"`
}

// Hypervisor runs machines. Implementations are safe for concurrent use, also
// by several processes; all methods end early with the context's error.
type Hypervisor interface {
	// Define makes a machine that is off, or replaces the one of that name.
	// Each disk of cfg has its backing under its name. The error wraps
	// ErrUnsupported, ErrInvalid or ErrRunning if it is one of these.
	Define(ctx context.Context, cfg Config, disks map[string]Backing) error

	// Start boots a machine. One that is not off gives ErrRunning.
	Start(ctx context.Context, name string) error

	// Stop cuts the power of a machine, after what the hypervisor has accepted
	// from it was flushed to the disks. It is off when Stop returns nil.
	// Stopping one that is off changes nothing.
	Stop(ctx context.Context, name string) error

	// State tells what a machine does.
	State(ctx context.Context, name string) (State, error)

	// Undefine forgets a machine that is off. Its disks stay.
	Undefine(ctx context.Context, name string) error
}
