package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Accelerators of QEMU.
const (
	KVM = "kvm" // the processor's own virtualisation
	TCG = "tcg" // translation: runs anywhere, some ten times slower
)

// probeTime is how long firmware may take to find that there is no disk; with a KVM that
// works it takes a fraction of a second.
const probeTime = 5 * time.Second

// ProbeAccel finds out which accelerator works. That /dev/kvm can be opened does not
// mean that a guest gets anywhere (nested virtualisation may hang), so the firmware of a machine without disks must
// come to its end. The answer is kept in dir, if that is not empty, until the host boots again.
func ProbeAccel(ctx context.Context, bin, dir string) (string, error) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return TCG, nil //nolint:nilerr // what hinders us would hinder QEMU
	}
	_ = f.Close()
	if bin == "" {
		bin = "qemu-system-x86_64"
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	kept := filepath.Join(dir, "accel")
	if dir != "" {
		b, err := os.ReadFile(kept)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("accelerator: %w", err)
		}
		if known, ok := strings.CutPrefix(string(b), strings.TrimSpace(string(boot))+" "); ok && (known == KVM || known == TCG) {
			return known, nil
		}
	}
	verdict := KVM
	if !firmwareEnds(ctx, bin) {
		if err := ctx.Err(); err != nil {
			return "", fmt.Errorf("accelerator: %w", err)
		}
		verdict = TCG
	}
	if dir != "" {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", fmt.Errorf("accelerator: %w", err)
		}
		if err := replaceFile(kept, []byte(strings.TrimSpace(string(boot))+" "+verdict)); err != nil {
			return "", fmt.Errorf("accelerator: %w", err)
		}
	}
	return verdict, nil
}

// firmwareEnds tells whether a machine without disks says so under KVM.
func firmwareEnds(ctx context.Context, bin string) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "-accel", KVM, "-machine", "q35,graphics=off", "-cpu", "max", "-m", "64M",
		"-no-user-config", "-nodefaults", "-display", "none", "-serial", "stdio")
	seen := &waitText{text: "No bootable device", found: cancel}
	cmd.Stdout = seen
	_ = cmd.Run() // it is killed in any case
	return seen.is
}

// waitText calls found when text was written to it.
type waitText struct {
	text  string
	found func()
	got   []byte
	is    bool
}

func (w *waitText) Write(p []byte) (int, error) {
	w.got = append(w.got, p...)
	if !w.is && strings.Contains(string(w.got), w.text) {
		w.is = true
		w.found()
	}
	if n := len(w.got) - 4096; n > 0 {
		w.got = w.got[n:]
	}
	return len(p), nil
}
