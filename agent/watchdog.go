package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// WatchdogCommand is the hidden subcommand that runs RunWatchdog.
const WatchdogCommand = "__watchdog"

// rescue says how to resume a guest from outside.
type rescue struct {
	Kind, Target string
	process      *process // of kind pid, see open
}

// open takes hold of what may be gone, or be another, by the time it is needed.
func (r *rescue) open() error {
	if r.Kind != "pid" {
		return nil
	}
	pid, err := strconv.Atoi(r.Target)
	if err != nil {
		return err
	}
	r.process, err = openProcess(pid)
	return err
}

func (r rescue) run(ctx context.Context) error {
	switch r.Kind {
	case "qmp":
		return rescueQMP(ctx, r.Target)
	case "freeze":
		return rescueFreeze(r.Target)
	case "pid":
		return r.process.signal(unix.SIGCONT)
	}
	return fmt.Errorf("no way known to resume %q", r.Kind)
}

// watchdog is a process of its own that resumes the guest when this process
// dies, or hangs past the deadline, between arm and disarm.
type watchdog struct {
	cmd *exec.Cmd
	mu  sync.Mutex // one question at a time
	in  io.WriteCloser
	out *bufio.Reader
}

// startWatchdog runs command (program and first arguments) with the rescue added.
func startWatchdog(command []string, r rescue) (*watchdog, error) {
	if len(command) == 0 {
		command = []string{"/proc/self/exe", WatchdogCommand}
	}
	args := append(append([]string(nil), command[1:]...), r.Kind, r.Target)
	// Without a context: it must outlive whatever ends the backup.
	w := &watchdog{cmd: exec.CommandContext(context.Background(), command[0], args...)}
	w.cmd.Stderr = os.Stderr
	// A session of its own: what kills our process group must not kill it.
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var err error
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	w.out = bufio.NewReader(out)
	if err := w.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the watchdog: %w", err)
	}
	if err := w.hear("ready"); err != nil {
		_ = w.close()
		return nil, err
	}
	return w, nil
}

func (w *watchdog) hear(want string) error {
	line, err := w.out.ReadString('\n')
	if err != nil {
		return fmt.Errorf("the watchdog is gone: %w", err)
	}
	if strings.TrimSpace(line) != want {
		return fmt.Errorf("the watchdog said %q, not %q", line, want)
	}
	return nil
}

// arm returns when the watchdog stands ready to resume the guest after limit.
func (w *watchdog) arm(limit time.Duration) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := fmt.Fprintf(w.in, "arm %d\n", limit.Milliseconds()); err != nil {
		return fmt.Errorf("arm the watchdog: %w", err)
	}
	return w.hear("armed")
}

func (w *watchdog) disarm() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := fmt.Fprintln(w.in, "disarm"); err != nil {
		return fmt.Errorf("disarm the watchdog: %w", err)
	}
	return w.hear("disarmed")
}

func (w *watchdog) close() error {
	_ = w.in.Close()
	return w.cmd.Wait()
}

// RunWatchdog is the watchdog process: args are the kind and target of the rescue; in
// and out are connected to the process it watches over, its parent. It ends when in does.
func RunWatchdog(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("the watchdog is started by tidemark itself")
	}
	r := rescue{Kind: args[0], Target: args[1]}
	if err := r.open(); err != nil {
		return err
	}
	parent := os.Getppid()
	lines := make(chan string)
	go func() {
		// Ends with the pipe, at the latest with this process.
		defer close(lines)
		sc := bufio.NewScanner(in)
		for sc.Scan() {
			lines <- sc.Text()
		}
	}()
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	var deadline <-chan time.Time
	for {
		select {
		case line, ok := <-lines:
			var ms int64
			switch n, _ := fmt.Sscanf(line, "arm %d", &ms); {
			case !ok && deadline != nil:
				return r.run(context.Background())
			case !ok:
				return nil
			case n == 1:
				deadline = time.After(time.Duration(ms) * time.Millisecond)
				line = "armed"
			case line == "disarm":
				deadline, line = nil, "disarmed"
			}
			// A parent that has died can't read this, and is seen above.
			_, _ = fmt.Fprintln(out, line)
		case <-deadline:
			// It hangs, and holds on to the monitor. Its guest comes first.
			if os.Getppid() == parent {
				_ = unix.Kill(parent, unix.SIGKILL)
			}
			return r.run(context.Background())
		}
	}
}
