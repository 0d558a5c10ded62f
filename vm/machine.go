package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/tidemark/tidemark/internal/qmp"
	"github.com/tidemark/tidemark/internal/tail"
)

// MachineOptions say how a [Machine] is run. Config and Disks are as for
// [Hypervisor.Define], but the firmware may be UEFI.
type MachineOptions struct {
	Config  Config
	Disks   map[string]Backing
	Accel   string // "kvm" or "tcg"; see [ProbeAccel]
	Bin     string // default "qemu-system-x86_64"
	Network bool   // a network of its own with a way out (QEMU's "user"); else the cards have no cable
	Display string // QEMU's -display; empty: none
	VNC     string // QEMU's -vnc; empty: none

	// Console gets what the guest prints on its first serial port, and what BIOS
	// firmware and boot loaders show on the screen as text. Nil: nobody.
	Console io.Writer
	// Input is typed into that port. Nil: nothing is.
	Input io.Reader

	// Dir is a private folder with a short name, for sockets and pictures. It is the machine's from now on, and
	// gone when the machine is, or could not be started. Default: a new one.
	Dir string
	// Guard is the program, with first arguments, that ends in [RunGuard].
	// Default: this program with [GuardCommand].
	Guard []string
	// Paused leaves the guest at its first instruction until Monitor().Cont.
	Paused bool
}

// Machine is a QEMU process that does not outlive the program that started it,
// however that ends, unless it is released. What its guest has flushed by then is on its disks.
//
// All methods are safe for concurrent use. It owns goroutines that end with QEMU.
type Machine struct {
	dir     string
	monitor *qmp.Client
	guard   *exec.Cmd
	hold    *os.File // the guard's sign of life
	stderr  tail.Buffer
	done    chan struct{} // closed when all is over; err is set before
	err     error

	resuming sync.Mutex // held while the guest is resumed or kept paused
	held     bool
}

// StartMachine runs a machine until Quit or Kill, the guest's power-off, or the end of
// this program. The context is for the start alone. QEMU has opened all disks when it
// returns. The error wraps ErrUnsupported or ErrInvalid if it is one of these.
func StartMachine(ctx context.Context, o MachineOptions) (_ *Machine, err error) {
	fail := func(err error) (*Machine, error) { return nil, fmt.Errorf("run VM %q: %w", o.Config.Name, err) }
	if err := o.Config.Validate(); err != nil {
		return fail(err)
	}
	dir := o.Dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "tidemark-vm-"); err != nil {
			return fail(err)
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	m := &Machine{dir: dir, done: make(chan struct{})}
	args, err := m.args(&o)
	if err != nil {
		return fail(err)
	}
	if err := m.start(&o, args); err != nil {
		return fail(err)
	}
	if m.monitor, err = m.connect(ctx); err != nil {
		m.Kill()
		return fail(m.describe(err))
	}
	return m, nil
}

// Dir is the machine's folder, private to its user and gone when the machine is: it holds
// its monitor's socket, and has room for others.
func (m *Machine) Dir() string { return m.dir }

// Monitor is the connection to QEMU.
func (m *Machine) Monitor() *qmp.Client { return m.monitor }

// Done is closed when QEMU has ended and all that it printed was passed on.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Err says how QEMU failed; nil if it did not, or runs still.
func (m *Machine) Err() error {
	select {
	case <-m.done:
	default:
		return nil
	}
	if m.err == nil {
		return nil
	}
	return m.describe(fmt.Errorf("QEMU: %w", m.err))
}

func (m *Machine) describe(err error) error {
	if s := m.stderr.String(); s != "" {
		return fmt.Errorf("%w: %s", err, s)
	}
	return err
}

// args is QEMU's command line.
func (m *Machine) args(o *MachineOptions) ([]string, error) {
	cfg := o.Config
	var firmware []string
	if cfg.Firmware.Type == UEFI {
		var err error
		if firmware, err = uefiArgs(m.dir); err != nil {
			return nil, err
		}
		cfg.Firmware.Type = BIOS // as far as qemuArgs is concerned
	}
	args, err := qemuArgs(&cfg, o.Disks)
	if err != nil {
		return nil, err
	}
	accel := o.Accel
	if accel == TCG {
		accel += ",thread=multi"
	}
	display := o.Display
	if display == "" {
		display = "none"
	}
	args = append(append(args, firmware...),
		"-accel", accel,
		// Its firmware shows its text on the serial port too (etc/sercon-port in SeaBIOS).
		"-machine", "graphics=off",
		"-device", "VGA", "-display", display,
		"-device", "pvpanic", "-action", "panic=none", // the guest's own way of dealing with a panic stays
		"-serial", "stdio", "-monitor", "none",
		"-qmp", "unix:"+commas(filepath.Join(m.dir, monitorFile))+",server=on,wait=off")
	if o.VNC != "" {
		args = append(args, "-vnc", o.VNC)
	}
	if o.Display != "" {
		args = append(args, "-device", "qemu-xhci", "-device", "usb-tablet")
	}
	if o.Network {
		args = withUserNetwork(args, len(cfg.NICs) > 0)
	}
	if o.Paused {
		args = append(args, "-S")
	}
	return args, nil
}

// withUserNetwork plugs the first card, or a new one, into a network of its own.
func withUserNetwork(args []string, card bool) []string {
	args = append([]string{"-netdev", "user,id=out"}, args...)
	if !card {
		return append(args, "-device", "virtio-net-pci,netdev=out")
	}
	for i, a := range args {
		if strings.Contains(a, ",id=nic0,") {
			args[i] += ",netdev=out"
		}
	}
	return args
}

// uefiImages are where distributions put UEFI for virtual machines: its code, and a
// template for its variables.
var uefiImages = [][2]string{
	{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},
	{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},
	{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},
	{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},
	{"/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"},
}

// uefiArgs gives the machine a UEFI whose variables are new: it boots what lies in
// the default place on the disk.
func uefiArgs(dir string) ([]string, error) {
	for _, u := range uefiImages {
		vars, err := os.ReadFile(u[1])
		if err != nil {
			continue
		}
		own := filepath.Join(dir, "uefi-vars")
		if err := os.WriteFile(own, vars, 0o600); err != nil {
			return nil, err
		}
		return []string{
			"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + commas(u[0]),
			"-drive", "if=pflash,unit=1,format=raw,file=" + commas(own),
		}, nil
	}
	return nil, fmt.Errorf("%w: no UEFI firmware for QEMU is installed (Debian: apt-get install ovmf)", ErrUnsupported)
}

// start runs QEMU below its guard.
func (m *Machine) start(o *MachineOptions, args []string) (err error) {
	bin := o.Bin
	if bin == "" {
		bin = "qemu-system-x86_64"
	}
	if bin, err = exec.LookPath(bin); err != nil {
		return fmt.Errorf("%w: %w (Debian: apt-get install qemu-system-x86)", ErrUnsupported, err)
	}
	guard, called := o.Guard, ""
	if len(guard) == 0 {
		guard = []string{"/proc/self/exe", GuardCommand}
		called = os.Args[0] // it may be a program of several names
	}
	held, hold, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = held.Close() }()
	// Without a context: it ends when it is told to, in order.
	m.guard = exec.CommandContext(context.Background(), guard[0], append(append(append([]string(nil), guard[1:]...), m.dir, bin), args...)...)
	if called != "" {
		m.guard.Args[0] = called
	}
	m.guard.ExtraFiles = []*os.File{held} // descriptor 3
	// What interrupts this program must not end QEMU before its disks are flushed.
	m.guard.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	m.guard.Stdin, m.guard.Stdout, m.guard.Stderr = o.Input, o.Console, &m.stderr
	m.guard.WaitDelay = time.Second
	if err := m.guard.Start(); err != nil {
		return errors.Join(err, hold.Close())
	}
	m.hold = hold
	go func() {
		err := m.guard.Wait()
		if errors.Is(err, exec.ErrWaitDelay) {
			err = nil // it only means that nothing more is typed
		}
		m.err = err
		_ = m.hold.Close()
		_ = os.RemoveAll(m.dir)
		close(m.done)
	}()
	return nil
}

// connect waits for the monitor: QEMU makes it before it opens its disks, and
// answers when it has.
func (m *Machine) connect(ctx context.Context) (*qmp.Client, error) {
	for {
		c, err := qmp.Dial(ctx, filepath.Join(m.dir, monitorFile), qmp.Options{Greeting: time.Hour})
		if err == nil {
			return c, nil
		}
		select {
		case <-m.done:
			return nil, errors.Join(errors.New("QEMU ended"), m.err)
		default:
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, qmp.ErrClosed) {
			return nil, err
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
}

// quitWait is how long QEMU may take to flush and close its disks.
const quitWait = 30 * time.Second

// Quit ends QEMU in order: what it has accepted from the guest is flushed to the
// disks when it returns. For the guest it is a power failure. A QEMU that does not
// end in time, or by the end of the context, is killed. Quitting twice is allowed.
func (m *Machine) Quit(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, quitWait)
	defer cancel()
	err := m.monitor.Quit(ctx)
	if errors.Is(err, qmp.ErrClosed) {
		err = nil
	}
	if err == nil {
		select {
		case <-m.done:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		m.Kill()
		return fmt.Errorf("QEMU did not end in order and was killed: %w", err)
	}
	_ = m.monitor.Close()
	return nil
}

// Kill ends QEMU as a power failure does, and waits.
func (m *Machine) Kill() {
	_ = m.hold.Close() // the guard sees it
	<-m.done
	if m.monitor != nil {
		_ = m.monitor.Close()
	}
}

// Release lets the machine go on when this program ends. Its disks must not need this program then.
func (m *Machine) Release() error {
	if _, err := m.hold.Write([]byte{guardRelease}); err != nil {
		return fmt.Errorf("release the VM: %w", err)
	}
	return nil
}

// PID is that of the guard, whose only child is QEMU.
func (m *Machine) PID() int { return m.guard.Process.Pid }

// Screenshot writes what the screen shows to a PNG file (QEMU 7.1 or later).
func (m *Machine) Screenshot(ctx context.Context, path string) error {
	return m.monitor.Execute(ctx, "screendump", map[string]string{"filename": path, "format": "png"}, nil)
}

// blockError is what QEMU tells of a failed request (BLOCK_IO_ERROR in its
// qapi/block-core.json).
type blockError struct {
	Node      string `json:"node-name"`
	Operation string `json:"operation"` // "read" or "write"
	Action    string `json:"action"`    // "stop": the guest was paused
	NoSpace   bool   `json:"nospace"`
	Reason    string `json:"reason"`
}

// Stall is a guest that was paused because a disk failed.
type Stall struct {
	Disk    string // QEMU's node: "disk0"
	Write   bool
	NoSpace bool // the overlay, or its file system, is full
	Reason  string
}

// Watcher is told what happens to a machine. Nil fields are not called; they are
// called by one goroutine.
type Watcher struct {
	Stalled  func(Stall) // paused: a disk failed. It is resumed now and then until that works
	Resumed  func()      // it runs again
	Panicked func()      // the guest's kernel said so
	Reset    func()      // the guest restarted
	Shutdown func()      // the guest powered off
}

const (
	firstResume = 500 * time.Millisecond
	lastResume  = 10 * time.Second
	// calm is how long a resumed guest must run without a failure to count as resumed.
	calm = 2 * time.Second
)

// Watch follows QEMU's events until ctx or the machine ends. A guest that was paused because a disk
// failed is resumed: the failed request is tried again, and if it fails again the guest
// is paused again. So nothing is lost while a repository can't be reached.
func (m *Machine) Watch(ctx context.Context, w Watcher) {
	var retry, settled <-chan time.Time
	wait, stalled := firstResume, false
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.done:
			return
		case e, ok := <-m.monitor.Events():
			if !ok {
				return
			}
			switch e.Name {
			case "BLOCK_IO_ERROR":
				var b blockError
				if json.Unmarshal(e.Data, &b) != nil || b.Action != "stop" {
					continue
				}
				if !stalled {
					call(w.Stalled, Stall{Disk: b.Node, Write: b.Operation == "write", NoSpace: b.NoSpace, Reason: b.Reason})
				}
				stalled, settled = true, nil
				if retry == nil {
					retry = time.After(wait)
					wait = min(2*wait, lastResume)
				}
			case "GUEST_PANICKED":
				run(w.Panicked)
			case "RESET":
				run(w.Reset)
			case "SHUTDOWN":
				run(w.Shutdown)
			}
		case <-retry:
			retry = nil
			if m.retry(ctx) {
				settled = time.After(calm)
			} else {
				retry = time.After(wait)
			}
		case <-settled:
			settled, stalled, wait = nil, false, firstResume
			run(w.Resumed)
		}
	}
}

// retry resumes a guest whose disk failed, unless it is to stay paused.
func (m *Machine) retry(ctx context.Context) bool {
	m.resuming.Lock()
	defer m.resuming.Unlock()
	return !m.held && m.monitor.Cont(ctx) == nil
}

// Pause stops the guest, until Resume. All that it has written is flushed to its disks then. The context is
// for the pausing; if it ends first, the guest may be paused, and Resume is still due.
func (m *Machine) Pause(ctx context.Context) error {
	m.resuming.Lock()
	defer m.resuming.Unlock()
	m.held = true
	return m.monitor.Stop(ctx)
}

// Resume lets a paused guest go on.
func (m *Machine) Resume(ctx context.Context) error {
	m.resuming.Lock()
	defer m.resuming.Unlock()
	m.held = false
	return m.monitor.Cont(ctx)
}

func call(f func(Stall), s Stall) {
	if f != nil {
		f(s)
	}
}

func run(f func()) {
	if f != nil {
		f()
	}
}
