package testvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// Modes of a source VM.
const (
	Writer = "writer" // tell what is on the disk, then write files for ever
	Show   = "show"   // tell what is on the disk and power off
)

// Drive says what a VM's disk is. Exactly one of Device, File and NBD is set.
type Drive struct {
	Device string // block device of the host; opened with O_DIRECT (cache=none)
	File   string // raw image file
	NBD    string // unix socket of an NBD server
	Export string // name of the NBD export, may be empty

	// ReadOnly has the guest see a disk that cannot be written. Its file system
	// must be clean then: a journal cannot be replayed.
	ReadOnly bool
	// Snapshot keeps the guest's writes in a temporary file and drops them at
	// the end.
	Snapshot bool
}

// blockdev makes the value of -drive.
func (d Drive) option() (string, error) {
	// A comma is doubled where it is not a separator.
	quote := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
	opts := []string{"if=none", "id=root"}
	set := 0
	if d.Device != "" {
		opts = append(opts, "format=raw", "cache=none", "discard=unmap", "file.driver=host_device", "file.filename="+quote(d.Device))
		set++
	}
	if d.File != "" {
		opts = append(opts, "format=raw", "discard=unmap", "file.driver=file", "file.filename="+quote(d.File))
		set++
	}
	if d.NBD != "" {
		opts = append(opts, "format=raw", "discard=unmap", "file.driver=nbd", "file.server.type=unix", "file.server.path="+quote(d.NBD), "file.export="+quote(d.Export))
		set++
	}
	if set != 1 {
		return "", errors.New("want exactly one of Device, File and NBD")
	}
	if d.ReadOnly {
		opts = append(opts, "readonly=on")
	}
	if d.Snapshot {
		opts = append(opts, "snapshot=on")
	}
	return strings.Join(opts, ","), nil
}

// Config of a source VM. Kernel and Disk must be set.
type Config struct {
	Name      string  // for messages, default "vm"
	Kernel    *Kernel // see FetchKernel
	Accel     string  // default: as Accel finds
	Disk      Drive   // holds a root file system of BuildImage
	MemoryMiB int     // default 256
	CPUs      int     // default 1
	Mode      string  // Writer or Show, default Show
	PauseMs   int     // between two files that a writer writes, in milliseconds
	Load      bool    // a writer also rewrites blocks all the time
	QMPSocket string  // path of the monitor's unix socket, none if empty
	// Console gets a copy of what the guest prints. It is written to by one
	// goroutine, before the line can be seen by WaitLine.
	Console io.Writer
}

// VM is a running source VM. All methods are safe for concurrent use.
type VM struct{ p *process }

// Start runs a VM. It is killed when ctx ends or this process does; whoever
// started it should still end it with Stop or Kill, which wait.
func Start(ctx context.Context, cfg Config) (*VM, error) {
	if cfg.Name == "" {
		cfg.Name = "vm"
	}
	fail := func(err error) (*VM, error) { return nil, fmt.Errorf("start %s: %w", cfg.Name, err) }
	if cfg.Kernel == nil {
		return fail(errors.New("no kernel"))
	}
	if cfg.MemoryMiB == 0 {
		cfg.MemoryMiB = 256
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = 1
	}
	switch cfg.Mode {
	case Writer, Show:
	case "":
		cfg.Mode = Show
	default:
		return fail(fmt.Errorf("unknown mode %q", cfg.Mode))
	}
	drive, err := cfg.Disk.option()
	if err != nil {
		return fail(err)
	}
	if cfg.Accel == "" {
		if cfg.Accel, err = Accel(ctx, cfg.Kernel); err != nil {
			return fail(err)
		}
	}
	load := 0
	if cfg.Load {
		load = 1
	}
	args := append(machineArgs(cfg.Accel, cfg.MemoryMiB, cfg.CPUs),
		"-name", strings.ReplaceAll(cfg.Name, ",", ",,"),
		"-drive", drive, "-device", "nvme,serial=tidemark,drive=root",
		"-kernel", cfg.Kernel.Image,
		"-append", fmt.Sprintf("%s root=/dev/nvme0n1 rootfstype=ext4 ro init=/init tidemark.mode=%s tidemark.pause=%d tidemark.load=%d",
			kernelArgs, cfg.Mode, cfg.PauseMs, load))
	if cfg.QMPSocket != "" {
		args = append(args, "-qmp", "unix:"+strings.ReplaceAll(cfg.QMPSocket, ",", ",,")+",server=on,wait=off")
	}
	p, err := startProcess(ctx, cfg.Name, args, cfg.Console)
	if err != nil {
		return fail(err)
	}
	return &VM{p}, nil
}

// WaitLine waits for a line of the console that matches, and returns it; lines
// that are there already count. The error wraps ErrEnded if the VM ended first,
// or the context's error, and tells QEMU's messages and the end of the console.
func (v *VM) WaitLine(ctx context.Context, re *regexp.Regexp) (Line, error) {
	return v.WaitLineAfter(ctx, -1, re)
}

// WaitLineAfter is WaitLine for lines with a number above n.
func (v *VM) WaitLineAfter(ctx context.Context, n int, re *regexp.Regexp) (Line, error) {
	l, err := v.p.console.wait(ctx, n+1, re)
	if err != nil {
		return Line{}, v.p.describe(err)
	}
	return l, nil
}

// WaitWrote waits until the guest of a writer has made file n, or one after
// it, durable.
func (v *VM) WaitWrote(ctx context.Context, n int) (Line, error) {
	for after := -1; ; {
		l, err := v.WaitLineAfter(ctx, after, wroteLine)
		if err != nil {
			return Line{}, err
		}
		if ParseConsole([]Line{l}).Wrote >= n {
			return l, nil
		}
		after = l.N
	}
}

var wroteLine = regexp.MustCompile(`TIDEMARK-GUEST wrote \d+$`)

// Console returns the lines printed so far, at least the newest 49,152.
func (v *VM) Console() []Line {
	lines, _, _ := v.p.console.from(0)
	return lines
}

// Report is what the guest has told so far.
func (v *VM) Report() Report { return ParseConsole(v.Console()) }

// PID is QEMU's process ID.
func (v *VM) PID() int { return v.p.cmd.Process.Pid }

// Done is closed when QEMU has ended and all it printed was read.
func (v *VM) Done() <-chan struct{} { return v.p.done }

// Wait waits for the VM to end by itself, as it does in mode Show. The error
// tells how QEMU failed, if it did.
func (v *VM) Wait(ctx context.Context) error {
	select {
	case <-v.p.done:
	case <-ctx.Done():
		return v.p.describe(fmt.Errorf("waiting for its end: %w", ctx.Err()))
	}
	if v.p.err != nil {
		return v.p.describe(ErrEnded)
	}
	return nil
}

// Stop ends QEMU in an orderly way and waits: what QEMU has accepted is on the
// disk then. For the guest it is a power failure. A VM that has ended may be
// stopped again.
func (v *VM) Stop() error { return v.p.stop() }

// Kill ends QEMU as kill -9 does, and waits.
func (v *VM) Kill() { v.p.kill() }
