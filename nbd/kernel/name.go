package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ParseDevice reads /dev/nbdN, or a link that leads there, and returns N.
func ParseDevice(path string) (int, error) {
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		target = path // devices may come to be by being attached
	}
	digits, ok := strings.CutPrefix(target, "/dev/nbd")
	n, err := strconv.ParseUint(digits, 10, 20)
	if !ok || err != nil || strconv.FormatUint(n, 10) != digits {
		return 0, fmt.Errorf("%s: not an NBD device: give /dev/nbdN", path)
	}
	return int(n), nil
}

// Path is the device's name in /dev.
func Path(index int) string { return "/dev/nbd" + strconv.Itoa(index) }

func sysfs(index int, name string) string {
	return filepath.Join("/sys/block", "nbd"+strconv.Itoa(index), name)
}

// backendOf is what the device was given as a backend when it was attached, "" if nothing.
func backendOf(index int) string {
	b, err := os.ReadFile(sysfs(index, "backend"))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// withConnections is a backend's name with the number of connections, which the kernel does not
// tell: a process that takes a device over has to bring as many.
func withConnections(backend string, n int) string { return fmt.Sprintf("%s x%d", backend, n) }

// connectionsOf is how many connections a device was attached with, 0 if it is not that backend.
func connectionsOf(index int, backend string) int {
	n, found := strings.CutPrefix(backendOf(index), backend+" x")
	if !found || backend == "" {
		return 0
	}
	if n, err := strconv.Atoi(n); err == nil && n > 0 && n <= MaxConnections {
		return n
	}
	return 0
}

// InUse tells whether the device is mounted, or part of another one.
func InUse(index int) (bool, error) {
	fd, err := unix.Open(Path(index), unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return false, unix.Close(fd)
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return false, nil
	}
	return false, &os.PathError{Op: "open", Path: Path(index), Err: err}
}

// Attached are the devices that are attached, as paths.
func Attached() []string {
	pids, _ := filepath.Glob("/sys/block/nbd*/pid") // there while it is attached
	var list []string
	for _, p := range pids {
		list = append(list, filepath.Join("/dev", filepath.Base(filepath.Dir(p))))
	}
	return list
}
