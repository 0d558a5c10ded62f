package testvm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Accelerators of QEMU.
const (
	KVM = "kvm" // the processor's own virtualisation
	TCG = "tcg" // translation: runs anywhere, some ten times slower
)

// Accel finds out which accelerator to use. /dev/kvm may be there and guests
// may still hang on it, so a real kernel has to reach user space within
// seconds. The answer is kept in the cache folder until the host boots again.
func Accel(ctx context.Context, k *Kernel) (string, error) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return TCG, nil // what hinders us would hinder QEMU
	}
	_ = f.Close()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	cache, err := CacheDir()
	if err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	id := sha256.Sum256(fmt.Appendf(nil, "%s %s %d", boot, k.Dir, os.Geteuid()))
	path := filepath.Join(cache, "accel", fmt.Sprintf("%x", id[:8]))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	unlock, err := lockFile(ctx, filepath.Join(cache, "accel", "lock"))
	if err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	defer unlock()
	switch verdict, err := os.ReadFile(path); {
	case err == nil && (string(verdict) == KVM || string(verdict) == TCG):
		return string(verdict), nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("accelerator: %w", err)
	}

	verdict := KVM
	if err := bootProbe(ctx, k, KVM, 10*time.Second); err != nil {
		if ctx.Err() != nil {
			return "", fmt.Errorf("accelerator: %w", ctx.Err())
		}
		verdict = TCG
	}
	if err := os.WriteFile(path, []byte(verdict), 0o644); err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	return verdict, nil
}

// bootProbe boots the kernel into a program of ours.
func bootProbe(ctx context.Context, k *Kernel, accel string, limit time.Duration) (err error) {
	dir, err := os.MkdirTemp("", "tidemark-probe")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	busybox, err := lookTool("busybox")
	if err != nil {
		return err
	}
	archive := filepath.Join(dir, "initramfs")
	a, err := createInitramfs(archive)
	if err != nil {
		return err
	}
	a.Char("dev/console", 5, 1)
	a.Host("bin/busybox", busybox, 0o755)
	a.Text("init", "#!/bin/busybox sh\necho TIDEMARK-PROBE alive\n/bin/busybox poweroff -f\n", 0o755)
	if err := a.close(); err != nil {
		return err
	}

	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	args := append(machineArgs(accel, 128, 1), "-kernel", k.Image, "-initrd", archive, "-append", kernelArgs)
	p, err := startProcess(ctx, "accelerator probe", args, nil)
	if err != nil {
		return err
	}
	defer p.kill()
	_, err = p.console.wait(ctx, 0, regexp.MustCompile("^TIDEMARK-PROBE alive"))
	if err != nil {
		return p.describe(err)
	}
	return nil
}

// kernelArgs make a kernel talk to the serial port, and a panic end QEMU at
// once together with -no-reboot.
const kernelArgs = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on"

// machineArgs are those of every VM: nothing but a serial port on QEMU's
// standard output.
func machineArgs(accel string, memoryMiB, cpus int) []string {
	cpu := "max"
	if accel == TCG {
		accel += ",thread=multi"
	}
	if strings.HasPrefix(accel, KVM) {
		cpu = "host"
	}
	return []string{
		"-accel", accel, "-cpu", cpu,
		"-m", fmt.Sprintf("%dM", memoryMiB), "-smp", fmt.Sprint(cpus),
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-serial", "stdio",
	}
}
