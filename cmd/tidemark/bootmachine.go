package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dustin/go-humanize"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/vm"
)

// What a machine has if neither its configuration nor a flag says so.
const (
	defaultMemory = 1 << 30
	defaultCPUs   = 1
)

// machineOptions are the flags by which a machine differs from its configuration.
type machineOptions struct {
	name, memory, bus, firmware  string
	kernel, initrd, append       string
	network, vnc, display, accel string
	cpus                         int
}

func (o *machineOptions) flags(f *pflag.FlagSet) {
	f.StringVar(&o.name, "name", "", "the VM's name for QEMU (default NAME)")
	f.StringVar(&o.memory, "memory", "", "memory, such as 4GiB (default 1GiB, or as configured)")
	f.IntVar(&o.cpus, "cpus", 0, "processors (default 1, or as configured)")
	f.StringVar(&o.bus, "bus", "", "what the disks are attached to: virtio, sata, nvme or scsi (default virtio, or as configured)")
	f.StringVar(&o.firmware, "firmware", "", "bios or uefi (default bios, or as configured)")
	f.StringVar(&o.kernel, "kernel", "", "boot this kernel instead of what is on the disk")
	f.StringVar(&o.initrd, "initrd", "", "with --kernel: its initial RAM disk")
	f.StringVar(&o.append, "append", "", "with --kernel: its command line")
	f.StringVar(&o.network, "network", "none", "none, or user: a network of its own from which it reaches others, and none reaches it")
	f.StringVar(&o.vnc, "vnc", "", "show the screen over VNC, at 127.0.0.1:1 or unix:PATH")
	f.StringVar(&o.display, "display", "", "show the screen in a window: gtk, sdl or what else QEMU knows")
	f.StringVar(&o.accel, "accel", "auto", "kvm, tcg (no virtualisation by the processor, ten times slower) or auto: kvm if it works")
}

// config is the point's machine, or a plain one, with what flags say.
func (o *machineOptions) config(p *restore.PointDetails) (*vm.Config, error) {
	if o.network != "none" && o.network != "user" {
		return nil, usageError{fmt.Errorf("--network %s: it is none or user", o.network)}
	}
	if o.kernel == "" && (o.initrd != "" || o.append != "") {
		return nil, usageError{errors.New("--initrd and --append go with --kernel")}
	}
	cfg := &vm.Config{
		Version: vm.FormatVersion, Name: p.VM, CPUs: defaultCPUs, Memory: defaultMemory,
		Firmware: vm.Firmware{Type: vm.BIOS}, Clock: vm.UTC,
	}
	if configured(p.Config) {
		var err error
		if cfg, err = vm.Decode(p.Config); err != nil {
			return nil, fmt.Errorf("the configuration of %s@%s: %w", p.VM, p.ID, err)
		}
	}
	if err := o.disks(cfg, p); err != nil {
		return nil, err
	}
	if o.name != "" {
		cfg.Name = o.name
	}
	if o.cpus != 0 {
		cfg.CPUs = o.cpus
	}
	if o.memory != "" {
		n, err := humanize.ParseBytes(o.memory)
		if err != nil || n > 64<<40 {
			return nil, usageError{fmt.Errorf("--memory %s: a size such as 4GiB", o.memory)}
		}
		cfg.Memory = int64(n) / (1 << 20) * (1 << 20)
	}
	switch o.firmware {
	case "":
	case "bios", "uefi":
		cfg.Firmware = vm.Firmware{Type: vm.FirmwareType(o.firmware)}
	default:
		return nil, usageError{fmt.Errorf("--firmware %s: it is bios or uefi", o.firmware)}
	}
	if o.kernel != "" {
		cfg.Firmware = vm.Firmware{Type: vm.Kernel, Kernel: o.kernel, Initrd: o.initrd, CommandLine: o.append}
	}
	if err := cfg.Validate(); err != nil {
		return nil, usageError{err}
	}
	return cfg, nil
}

func configured(config []byte) bool { return len(config) > 0 && !bytes.Equal(config, []byte("null")) }

// disks gives the machine exactly the disks of the point: what it has besides was not backed up.
func (o *machineOptions) disks(cfg *vm.Config, p *restore.PointDetails) error {
	had := map[string]vm.Disk{}
	for _, d := range cfg.Disks {
		had[d.Name] = d
	}
	cfg.Disks = nil
	names := map[string]bool{}
	for _, n := range cfg.NICs {
		names[n.Name] = true
	}
	for _, info := range p.Disks {
		d, ok := had[info.Name]
		if !ok {
			d = vm.Disk{Name: info.Name, Bus: vm.Virtio}
		}
		switch o.bus {
		case "":
		case "virtio", "sata", "nvme", "scsi":
			d.Bus = vm.Bus(o.bus)
		default:
			return usageError{fmt.Errorf("--bus %s: it is virtio, sata, nvme or scsi", o.bus)}
		}
		cfg.Disks = append(cfg.Disks, d)
		names[d.Name] = true
	}
	boot := cfg.Boot
	cfg.Boot = nil
	for _, b := range boot {
		if names[b] {
			cfg.Boot = append(cfg.Boot, b)
		}
	}
	return nil
}

// chooseAccel finds out what works, once per boot of this host.
func (o *machineOptions) chooseAccel(ctx context.Context) (string, error) {
	switch o.accel {
	case vm.KVM, vm.TCG:
		return o.accel, nil
	case "auto":
	default:
		return "", usageError{fmt.Errorf("--accel %s: it is kvm, tcg or auto", o.accel)}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return vm.ProbeAccel(ctx, "", "")
	}
	return vm.ProbeAccel(ctx, "", filepath.Join(cache, "tidemark"))
}

// eachKey makes the terminal pass on each key at once and show none, but for those that
// are signals.
func eachKey(fd int) (undo func(), err error) {
	was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	now := *was
	now.Lflag &^= unix.ICANON | unix.ECHO
	now.Iflag &^= unix.ICRNL
	now.Cc[unix.VMIN], now.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &now); err != nil {
		return nil, err
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, was) }, nil
}
