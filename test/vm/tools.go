package testvm

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// ErrMissing is wrapped when a program that is needed is not installed.
var ErrMissing = errors.New("missing")

// debianPackage tells which package of Debian 12 has a program that this
// repository's tests use, or "" if that is not known.
func debianPackage(tool string) string {
	switch tool {
	case "qemu-system-x86_64":
		return "qemu-system-x86"
	case "qemu-img", "qemu-nbd", "qemu-io", "qemu-storage-daemon":
		return "qemu-utils"
	case "busybox":
		return "busybox-static"
	case "mkfs.ext4", "debugfs", "e2fsck":
		return "e2fsprogs"
	case "mkfs.xfs":
		return "xfsprogs"
	case "mkfs.btrfs":
		return "btrfs-progs"
	case "modprobe", "depmod":
		return "kmod"
	case "dpkg-deb":
		return "dpkg"
	case "apt-get", "apt-cache":
		return "apt"
	case "nbdinfo", "nbdcopy":
		return "libnbd-bin"
	case "ldd":
		return "libc-bin"
	case "losetup":
		return "mount"
	case "sfdisk":
		return "fdisk"
	case "fusermount3":
		return "fuse3"
	case "dmsetup":
		return "dmsetup"
	case "xz":
		return "xz-utils"
	case "fio", "nbdkit", "clang", "zstd":
		return tool
	}
	return ""
}

// lookTool finds a program, also where only root's PATH looks.
func lookTool(tool string) (string, error) {
	p, err := exec.LookPath(tool)
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if err == nil {
			break
		}
		p, err = exec.LookPath(filepath.Join(dir, tool))
	}
	if err != nil {
		hint := ""
		if pkg := debianPackage(tool); pkg != "" {
			hint = " (apt install " + pkg + ")"
		}
		return "", fmt.Errorf("%s is %w%s", tool, ErrMissing, hint)
	}
	if tool == "busybox" {
		return p, checkStatic(p)
	}
	return p, nil
}

// checkStatic refuses a busybox that needs libraries, which guests have not.
func checkStatic(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	defer func() { _ = f.Close() }()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("statically linked busybox is %w (apt install busybox-static)", ErrMissing)
		}
	}
	return nil
}

// Missing returns one error per program that is not installed; each wraps
// ErrMissing and names the Debian package that has it.
func Missing(tools ...string) []error {
	var errs []error
	for _, tool := range tools {
		if _, err := lookTool(tool); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// run executes a program and returns its standard output. The error has what
// the program wrote to standard error.
func run(ctx context.Context, dir, tool string, args ...string) ([]byte, error) {
	path, err := lookTool(tool)
	if err != nil {
		return nil, err
	}
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = &out, &errOut
	// depmod and others live where only root's PATH looks.
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.Bytes(), nil
}
