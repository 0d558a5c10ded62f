package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/internal/qmp"
)

// QEMU is a Hypervisor that runs each machine in a QEMU process of its own.
// The processes outlive the program that started them: what is defined lies in
// Dir, and what runs is found by its monitor socket there.
//
// Per machine there is a folder of its name (escaped as in a URL) with:
//
//	vm.json       the configuration
//	disks.json    the backings of its disks
//	qmp           QEMU's monitor, which serves one client at a time
//	console.log   what the guest printed on its first serial port, ever growing
type QEMU struct {
	Dir   string // absolute and short, as sockets lie below it; made if needed
	Accel string // "kvm", "tcg", or empty: kvm where it opens, else tcg
	Bin   string // default "qemu-system-x86_64"
}

var _ Hypervisor = (*QEMU)(nil)

const (
	configFile  = "vm.json"
	disksFile   = "disks.json"
	monitorFile = "qmp"
	lockName    = "lock"
	pidFile     = "pid"
	consoleFile = "console.log"

	// maxSocket is the longest path of a unix socket (sun_path in unix(7)).
	maxSocket = 107
)

// Console is the path of the file that a machine's console is kept in.
func (q *QEMU) Console(name string) string { return filepath.Join(q.folder(name), consoleFile) }

// Monitor is the path of a running machine's QMP socket.
func (q *QEMU) Monitor(name string) string { return filepath.Join(q.folder(name), monitorFile) }

func (q *QEMU) folder(name string) string { return filepath.Join(q.Dir, url.PathEscape(name)) }

// Define implements Hypervisor.
func (q *QEMU) Define(ctx context.Context, cfg Config, disks map[string]Backing) error {
	fail := func(err error) error { return fmt.Errorf("define VM %q: %w", cfg.Name, err) }
	config, err := cfg.Encode()
	if err != nil {
		return fail(err)
	}
	// What cannot be started must not be defined.
	if _, err := qemuArgs(&cfg, disks); err != nil {
		return fail(err)
	}
	backings, err := json.MarshalIndent(disks, "", "  ")
	if err != nil {
		return fail(err)
	}
	// QEMU's working directory is not ours.
	if !filepath.IsAbs(q.Dir) {
		return fail(fmt.Errorf("%w: folder %q is not absolute", ErrInvalid, q.Dir))
	}
	if n := len(q.Monitor(cfg.Name)); n > maxSocket {
		return fail(fmt.Errorf("the path of its monitor has %d bytes, a socket's may have %d", n, maxSocket))
	}
	if err := os.MkdirAll(q.folder(cfg.Name), 0o700); err != nil {
		return fail(err)
	}
	unlock, err := q.lock(ctx, cfg.Name)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	if state, err := q.state(ctx, cfg.Name); err != nil {
		return fail(err)
	} else if state != Off {
		return fail(ErrRunning)
	}
	// The configuration last: it is what makes the machine exist.
	for _, f := range []struct {
		name    string
		content []byte
	}{{disksFile, backings}, {configFile, config}} {
		if err := replaceFile(filepath.Join(q.folder(cfg.Name), f.name), f.content); err != nil {
			return fail(err)
		}
	}
	return nil
}

// Start implements Hypervisor. It returns when QEMU has opened all disks and the
// machine runs; what the guest does then is for its console to tell.
func (q *QEMU) Start(ctx context.Context, name string) error {
	fail := func(err error) error { return fmt.Errorf("start VM %q: %w", name, err) }
	unlock, err := q.lock(ctx, name)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	cfg, disks, err := q.load(name)
	if err != nil {
		return fail(err)
	}
	if state, err := q.state(ctx, name); err != nil {
		return fail(err)
	} else if state != Off {
		return fail(ErrRunning)
	}
	args, err := qemuArgs(cfg, disks)
	if err != nil {
		return fail(err)
	}
	// One that was left by a crash would name somebody else's process.
	pid := filepath.Join(q.folder(name), pidFile)
	if err := os.Remove(pid); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	accel := q.Accel
	if accel == "" {
		accel = "kvm:tcg" // tried in this order
	}
	for a := range strings.SplitSeq(accel, ":") {
		args = append(args, "-accel", a)
	}
	args = append(args,
		"-display", "none",
		"-chardev", "file,id=console,append=on,path="+commas(q.Console(name)), "-serial", "chardev:console",
		"-qmp", "unix:"+commas(q.Monitor(name))+",server=on,wait=off",
		// QEMU's first process ends when the machine runs, or tells why it cannot.
		"-daemonize", "-pidfile", commas(pid))
	bin := q.Bin
	if bin == "" {
		bin = "qemu-system-x86_64"
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 5 * time.Second // should the machine have kept the pipe
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			// The machine's own process has left ours behind, and may hang in
			// opening a disk.
			return fail(errors.Join(ctx.Err(), killStarting(pid)))
		}
		return fail(fmt.Errorf("%w: %s", err, strings.TrimSpace(out.String())))
	}
	return nil
}

// killStarting ends a QEMU that was told to start and has not got there. It
// writes its PID early, but the one who waited for it may have been faster.
func killStarting(pidFile string) error {
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		pid, err := readPID(pidFile)
		if err != nil {
			continue // not there, or half written
		}
		if err := unix.Kill(pid, unix.SIGKILL); !errors.Is(err, unix.ESRCH) {
			return errors.Join(err, os.Remove(pidFile))
		}
		return nil
	}
	return nil // it never came that far
}

// Stop implements Hypervisor.
func (q *QEMU) Stop(ctx context.Context, name string) error {
	fail := func(err error) error { return fmt.Errorf("stop VM %q: %w", name, err) }
	unlock, err := q.lock(ctx, name)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	c, err := q.dial(ctx, name)
	if errors.Is(err, errOff) {
		return nil
	}
	if err != nil {
		return fail(err)
	}
	defer func() { _ = c.Close() }()
	// The PID is that of the process at the other end of the monitor, and cannot
	// be another's once the descriptor is open and the monitor still answers.
	pid, err := readPID(filepath.Join(q.folder(name), pidFile))
	if err != nil {
		return fail(err)
	}
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = unix.Close(process) }()
	if err := c.Quit(ctx); err != nil && !errors.Is(err, qmp.ErrClosed) {
		return fail(err)
	}
	for {
		ended := []unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}
		if n, err := unix.Poll(ended, 0); n == 1 {
			return nil
		} else if err != nil && !errors.Is(err, unix.EINTR) {
			return fail(err)
		}
		if err := pause(ctx); err != nil {
			return fail(err)
		}
	}
}

// readPID reads what QEMU's -pidfile has written.
func readPID(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s holds %q, which is no PID", path, b)
	}
	return pid, nil
}

// State implements Hypervisor.
func (q *QEMU) State(ctx context.Context, name string) (State, error) {
	state, err := q.state(ctx, name)
	if err == nil && state == Off {
		_, _, err = q.load(name)
	}
	if err != nil {
		return "", fmt.Errorf("state of VM %q: %w", name, err)
	}
	return state, nil
}

// Undefine implements Hypervisor. The console's log goes too.
func (q *QEMU) Undefine(ctx context.Context, name string) error {
	fail := func(err error) error { return fmt.Errorf("undefine VM %q: %w", name, err) }
	unlock, err := q.lock(ctx, name)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	if state, err := q.state(ctx, name); err != nil {
		return fail(err)
	} else if state != Off {
		return fail(ErrRunning)
	}
	// In case of a crash in between, what is left is not a machine any more.
	if err := os.Remove(filepath.Join(q.folder(name), configFile)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = ErrNotDefined
		}
		return fail(err)
	}
	if err := os.RemoveAll(q.folder(name)); err != nil {
		return fail(err)
	}
	return nil
}

// errOff tells that no QEMU is there.
var errOff = errors.New("off")

// dial connects to the monitor.
func (q *QEMU) dial(ctx context.Context, name string) (*qmp.Client, error) {
	for end := time.Now().Add(endingWait); ; {
		c, err := qmp.Dial(ctx, q.Monitor(name), qmp.Options{})
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
			return nil, errOff
		case !errors.Is(err, qmp.ErrClosed) || time.Now().After(end):
			return c, err
		}
		// Hung up on without a greeting: QEMU is just ending.
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
}

// endingWait is how long a QEMU that ends may take to close its monitor.
const endingWait = 5 * time.Second

// pause waits a moment between two looks at what cannot be waited for.
func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(10 * time.Millisecond):
		return nil
	}
}

// state asks QEMU alone, whether the machine is defined or not.
func (q *QEMU) state(ctx context.Context, name string) (State, error) {
	c, err := q.dial(ctx, name)
	if errors.Is(err, errOff) {
		return Off, nil
	}
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	status, err := c.Status(ctx)
	if errors.Is(err, qmp.ErrClosed) {
		return Off, nil // it ended just now
	}
	if err != nil {
		return "", err
	}
	switch status { // RunState in QEMU's qapi/run-state.json
	case qmp.StatusRunning:
		return Running, nil
	case "io-error", "internal-error", "guest-panicked":
		return Failed, nil
	}
	return Paused, nil
}

// load reads a definition.
func (q *QEMU) load(name string) (*Config, map[string]Backing, error) {
	b, err := os.ReadFile(filepath.Join(q.folder(name), configFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, ErrNotDefined
	}
	if err != nil {
		return nil, nil, err
	}
	cfg, err := Decode(b)
	if err != nil {
		return nil, nil, err
	}
	b, err = os.ReadFile(filepath.Join(q.folder(name), disksFile))
	if err != nil {
		return nil, nil, err
	}
	var disks map[string]Backing
	if err := json.Unmarshal(b, &disks); err != nil {
		return nil, nil, fmt.Errorf("%w: %s: %w", ErrInvalid, disksFile, err)
	}
	return cfg, disks, nil
}

// lock keeps others from changing a machine. A machine without a folder is not
// defined.
func (q *QEMU) lock(ctx context.Context, name string) (unlock func(), err error) {
	if !validName(name) {
		return nil, fmt.Errorf("%w: name %q", ErrInvalid, name)
	}
	f, err := os.OpenFile(filepath.Join(q.folder(name), lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotDefined
	}
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, err
		}
		if err := pause(ctx); err != nil { // flock(2) knows no cancelling
			_ = f.Close()
			return nil, err
		}
	}
}

// replaceFile writes a file so that after a power failure it is either the old
// or the new one.
func replaceFile(path string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
