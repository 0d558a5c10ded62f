package vm

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
)

// sataPorts is how many SATA ports QEMU's q35 machine has.
const sataPorts = 6

// qemuArgs describes a machine to qemu-system-x86_64 7.0 or later. cfg must be
// valid.
func qemuArgs(cfg *Config, disks map[string]Backing) ([]string, error) {
	args := []string{
		"-name", "guest=" + commas(cfg.Name),
		"-machine", "q35", "-cpu", "max",
		"-m", fmt.Sprintf("%dM", cfg.Memory>>20), "-smp", fmt.Sprint(cfg.CPUs),
		"-no-user-config", "-nodefaults",
		"-rtc", "base=" + string(cfg.Clock),
		"-device", "virtio-rng-pci",
	}
	switch f := cfg.Firmware; f.Type {
	case BIOS: // QEMU's default
	case Kernel:
		args = append(args, "-kernel", f.Kernel)
		if f.Initrd != "" {
			args = append(args, "-initrd", f.Initrd)
		}
		if f.CommandLine != "" {
			args = append(args, "-append", f.CommandLine)
		}
	default:
		return nil, fmt.Errorf("%w: firmware %q with QEMU", ErrUnsupported, f.Type)
	}

	bootIndex := func(name string) string {
		for i, b := range cfg.Boot {
			if b == name {
				return fmt.Sprintf(",bootindex=%d", i)
			}
		}
		return ""
	}
	sata := 0
	for i, d := range cfg.Disks {
		back, ok := disks[d.Name]
		if !ok {
			return nil, fmt.Errorf("%w: disk %q has no backing", ErrInvalid, d.Name)
		}
		id := fmt.Sprintf("disk%d", i)
		node, err := blockdev(id, back)
		if err != nil {
			return nil, fmt.Errorf("disk %q: %w", d.Name, err)
		}
		args = append(args, "-blockdev", node)
		var dev string
		switch d.Bus {
		case Virtio:
			dev = "virtio-blk-pci"
		case SCSI:
			// A controller each: no limit to their number, and a queue of its own.
			args = append(args, "-device", "virtio-scsi-pci,id=scsi"+id)
			dev = "scsi-hd,bus=scsi" + id + ".0"
		case SATA:
			if sata == sataPorts {
				return nil, fmt.Errorf("%w: more than %d SATA disks with QEMU", ErrUnsupported, sataPorts)
			}
			dev = fmt.Sprintf("ide-hd,bus=ide.%d", sata)
			sata++
		case NVMe:
			dev = "nvme"
		}
		serial := d.Serial
		if serial == "" && d.Bus == NVMe {
			serial = id // the device insists on one
		}
		dev += ",id=" + id + "-device,drive=" + id + bootIndex(d.Name)
		if serial != "" {
			dev += ",serial=" + commas(serial)
		}
		if d.Bus == NVMe {
			// QEMU's NVMe (7.2: nvme_blk_write in its hw/nvme/ctrl.c) drops the FUA bit, by which file systems make their
			// journals' commits durable. Without a write cache every write is. It hands errors to the guest.
			dev += ",write-cache=off"
		} else {
			// A disk that fails for a while pauses its machine: no write is lost, and the
			// guest goes on where it was once the disk is back.
			dev += ",werror=stop,rerror=stop"
		}
		args = append(args, "-device", dev)
	}
	if len(disks) > len(cfg.Disks) {
		return nil, fmt.Errorf("%w: %d backings for %d disks", ErrInvalid, len(disks), len(cfg.Disks))
	}
	for i, n := range cfg.NICs {
		model := n.Model
		if model == "virtio" {
			model = "virtio-net-pci"
		}
		// The card is there, so that the guest finds its own, but no cable is in: a
		// copy of a machine must not meet its original on a network.
		args = append(args, "-device", fmt.Sprintf("%s,id=nic%d,mac=%s%s", model, i, n.MAC, bootIndex(n.Name)))
	}
	return args, nil
}

// blockdev describes where a disk's bytes are, in QEMU's JSON form, which needs
// no quoting.
func blockdev(node string, b Backing) (string, error) {
	opts := map[string]any{"node-name": node, "read-only": b.ReadOnly, "discard": "unmap"}
	switch {
	case !filepath.IsAbs(b.NBD + b.Device + b.File): // of which two are empty
		return "", fmt.Errorf("%w: a backing is an absolute path", ErrInvalid)
	case b.NBD != "" && b.Device == "" && b.File == "":
		opts["driver"] = "nbd"
		opts["server"] = map[string]string{"type": "unix", "path": b.NBD}
		opts["export"] = b.Export
	case b.File != "" && b.NBD == "" && b.Device == "" && b.Export == "":
		opts["driver"] = "file"
		opts["filename"] = b.File
	case b.Device != "" && b.NBD == "" && b.File == "" && b.Export == "":
		opts["driver"] = "host_device"
		opts["filename"] = b.Device
		// Past the host's page cache, where writes would wait unseen.
		opts["cache"] = map[string]bool{"direct": true}
	default:
		return "", fmt.Errorf("%w: a backing is an NBD socket, a device or a file", ErrInvalid)
	}
	j, err := json.Marshal(opts)
	return string(j), err
}

// commas doubles the character that separates QEMU's options.
func commas(s string) string { return strings.ReplaceAll(s, ",", ",,") }
