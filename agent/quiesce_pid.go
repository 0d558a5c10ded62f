package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/store"
)

// process is a process that can't be mistaken for another one that gets its
// number later.
type process struct {
	pid int
	fd  int // pidfd
}

func openProcess(pid int) (*process, error) {
	if pid <= 1 {
		return nil, fmt.Errorf("process %d can't be paused", pid)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	return &process{pid, fd}, nil
}

func (p *process) signal(s unix.Signal) error { return unix.PidfdSendSignal(p.fd, s, nil, 0) }

// pidPauser stops a process that writes to the disk, whatever it is.
type pidPauser struct {
	pid     int
	process *process
	stopped atomic.Bool
}

func (p *pidPauser) Method() string                 { return "pid" }
func (p *pidPauser) Consistency() store.Consistency { return store.Crash }
func (p *pidPauser) rescue() rescue                 { return rescue{Kind: "pid", Target: strconv.Itoa(p.pid)} }

func (p *pidPauser) Prepare(context.Context) (err error) {
	p.process, err = openProcess(p.pid)
	return err
}

func (p *pidPauser) Running(context.Context) (bool, error) { return state(p.pid) != 'T', nil }

func (p *pidPauser) Flush(context.Context) error { return nil }

func (p *pidPauser) Pause(ctx context.Context) error {
	if state(p.pid) == 'T' {
		return nil // stopped by somebody else
	}
	p.stopped.Store(true)
	if err := p.process.signal(unix.SIGSTOP); err != nil {
		p.stopped.Store(false)
		return fmt.Errorf("stop process %d: %w", p.pid, err)
	}
	for !allStopped(p.pid) {
		if err := sleep(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("wait for process %d to stop: %w", p.pid, err)
		}
	}
	return nil
}

func (p *pidPauser) Resume(context.Context) error {
	if !p.stopped.Swap(false) {
		return nil
	}
	if err := p.process.signal(unix.SIGCONT); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("continue process %d: %w", p.pid, err)
	}
	return nil
}

func (p *pidPauser) Close() error {
	if p.process == nil {
		return nil
	}
	return errors.Join(p.Resume(context.Background()), unix.Close(p.process.fd))
}

// state is the process state letter of proc(5).
func state(pid int) byte { return stateOf(fmt.Sprintf("/proc/%d/stat", pid)) }

func stateOf(file string) byte {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	// The command name is in parentheses and may hold any character.
	if i := strings.LastIndexByte(string(b), ')'); i >= 0 && i+2 < len(b) {
		return b[i+2]
	}
	return 0
}

// allStopped looks at every thread: io_uring's workers run on until they see the signal.
func allStopped(pid int) bool {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(tasks) == 0 {
		return true
	}
	for _, t := range tasks {
		if s := stateOf(t); s != 'T' && s != 't' && s != 'Z' && s != 'X' && s != 0 {
			return false
		}
	}
	return true
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
