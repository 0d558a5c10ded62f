package agent

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/tidemark/tidemark/store"
)

// Pauser stops a guest's writes for a moment.
type Pauser interface {
	// Method is its name in the point: "qmp", "freeze", "pid".
	Method() string

	// Consistency is what a point is that was read while paused.
	Consistency() store.Consistency

	// Prepare gets ready, so that Pause is quick.
	Prepare(ctx context.Context) error

	// Running tells whether Pause will have something to do.
	Running(ctx context.Context) (bool, error)

	// Flush lets dirty data out while the guest runs, so that Pause has less to
	// wait for.
	Flush(ctx context.Context) error

	// Pause returns when no write is under way and none will begin. A guest
	// that was not running is left as it is.
	Pause(ctx context.Context) error

	// Resume undoes Pause, and does nothing if Pause did nothing. It may be called
	// while Pause is under way.
	Resume(ctx context.Context) error

	// Close resumes if need be and lets go.
	Close() error

	// rescue is how another process resumes the guest when this one has died.
	rescue() rescue
}

// Errors of a quiesce, wrapped with context.
var (
	ErrPauseBudget   = errors.New("the pause budget can't be met")
	ErrInUse         = errors.New("the disk is in use and nothing is known that could pause its user")
	ErrUnseen        = errors.New("no instant can be proven")
	ErrQuiesceSyntax = errors.New("quiesce must be auto, qmp=SOCKET, freeze=DIR, pid=PID or none")
)

// Quiesce is a choice of how one instant of the disks is reached.
type Quiesce struct {
	Kind   string // "auto", "qmp", "freeze", "pid", "none"
	Target string
}

// ParseQuiesce reads what the command line and the configuration say. The
// empty text means auto. Errors wrap ErrQuiesceSyntax.
func ParseQuiesce(s string) (Quiesce, error) {
	kind, target, has := strings.Cut(s, "=")
	q := Quiesce{kind, target}
	switch kind {
	case "":
		if s == "" {
			return Quiesce{Kind: "auto"}, nil
		}
	case "auto", "none":
		if !has {
			return q, nil
		}
	case "qmp", "freeze":
		if target != "" {
			return q, nil
		}
	case "pid":
		if n, err := strconv.Atoi(target); err == nil && n > 1 {
			return q, nil
		}
	}
	return Quiesce{}, fmt.Errorf("%q: %w", s, ErrQuiesceSyntax)
}

func (q Quiesce) String() string {
	if q.Target == "" {
		return q.Kind
	}
	return q.Kind + "=" + q.Target
}

// pid is the process that was named as the VM's, or 0.
func (q Quiesce) pid() int {
	if q.Kind != "pid" {
		return 0
	}
	n, _ := strconv.Atoi(q.Target)
	return n
}

func paths(disks []*device) []string {
	out := make([]string, len(disks))
	for i, d := range disks {
		out[i] = d.path
	}
	return out
}

// pauser makes the Pauser of a choice; nil for none and for auto where no
// user of the disks is known. The text says what was chosen, and why.
func (q Quiesce) pauser(disks []*device, users []user) (Pauser, string, error) {
	switch q.Kind {
	case "qmp":
		return &qmpPauser{socket: q.Target}, q.String(), nil
	case "freeze":
		return &freezePauser{dir: q.Target, disks: paths(disks)}, q.String(), nil
	case "pid":
		pid, err := strconv.Atoi(q.Target)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", q, ErrQuiesceSyntax)
		}
		return &pidPauser{pid: pid}, q.String(), nil
	case "none":
		return nil, q.String(), nil
	}
	return choose(disks, users)
}
