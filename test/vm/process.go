package testvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/tidemark/tidemark/internal/tail"
)

// process is a running QEMU whose serial port is its standard output. It owns
// two goroutines, which end with QEMU.
type process struct {
	name    string
	cmd     *exec.Cmd
	console *console
	stderr  tail.Buffer
	done    chan struct{} // closed when all is over; err is set before
	err     error         // how QEMU ended
}

// startProcess runs QEMU until it ends, ctx ends or this process does.
func startProcess(ctx context.Context, name string, args []string, copyTo io.Writer) (*process, error) {
	bin, err := lookTool("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p := &process{name: name, console: newConsole(), done: make(chan struct{})}
	p.cmd = exec.CommandContext(ctx, bin, args...)
	p.cmd.Stdout, p.cmd.Stderr = w, &p.stderr
	// A VM that outlives a killed test would keep its disk busy for ever.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

	started := make(chan error)
	go func() {
		// The death signal comes when the thread that started the child ends, so
		// that thread must live as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		_ = w.Close()
		started <- err
		if err != nil {
			return
		}
		read := make(chan struct{})
		go func() {
			defer close(read)
			p.console.readFrom(r, copyTo)
		}()
		p.err = p.cmd.Wait()
		<-read
		_ = r.Close()
		close(p.done)
	}()
	if err := <-started; err != nil {
		_ = r.Close()
		return nil, err
	}
	return p, nil
}

// stopWait is how long QEMU has to write back and close its disks.
const stopWait = 15 * time.Second

// stop asks QEMU to end, and kills it if it does not. The guest is not asked.
func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(stopWait):
		p.kill()
		return fmt.Errorf("%s: QEMU did not end within %s and was killed", p.name, stopWait)
	}
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // its only error is that the process is gone
	<-p.done
}

// describe adds to err what is known about a VM that did not do as it should.
func (p *process) describe(err error) error {
	var b strings.Builder
	select {
	case <-p.done:
		if p.err != nil {
			fmt.Fprintf(&b, "; QEMU: %v", p.err)
		}
	default:
	}
	if s := p.stderr.String(); s != "" {
		fmt.Fprintf(&b, "; QEMU says: %s", s)
	}
	lines, _, _ := p.console.from(0)
	if skip := len(lines) - 20; skip > 0 {
		lines = lines[skip:]
	}
	for i, l := range lines {
		if i == 0 {
			b.WriteString("; the console ends with:")
		}
		fmt.Fprintf(&b, "\n\t%s", l.Text)
	}
	return fmt.Errorf("%s: %w%s", p.name, err, b.String())
}
