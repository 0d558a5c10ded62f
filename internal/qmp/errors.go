package qmp

import (
	"errors"
	"fmt"
)

var (
	// ErrClosed is wrapped by the errors of all calls on a connection that has
	// ended, whoever ended it. The cause is wrapped too if there is one.
	ErrClosed = errors.New("qmp: connection closed")

	// ErrNotQMP is wrapped when the peer sends something that is not the
	// protocol: a human monitor, another service, or garbage.
	ErrNotQMP = errors.New("qmp: peer does not speak QMP")

	// ErrBusy is wrapped when a connection was taken but no greeting came. QEMU
	// serves one client per monitor and lets others wait in the backlog; a QEMU
	// process that is stopped looks the same.
	ErrBusy = errors.New("qmp: monitor is busy")

	// ErrTooLarge is wrapped when a message exceeds the limit. It comes along
	// with ErrNotQMP.
	ErrTooLarge = errors.New("message too large")
)

// Error is QEMU's own answer that a command failed.
type Error struct {
	Command string `json:"-"`     // the command that failed
	Class   string `json:"class"` // "GenericError", "CommandNotFound", ...
	Desc    string `json:"desc"`  // for a person
}

func (e *Error) Error() string {
	return fmt.Sprintf("qmp: %s: %s (%s)", e.Command, e.Desc, e.Class)
}
