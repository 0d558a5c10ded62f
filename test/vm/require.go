package testvm

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Require skips the test if one of the programs is not installed, and says
// which package has it.
func Require(t testing.TB, tools ...string) {
	t.Helper()
	if errs := Missing(tools...); len(errs) > 0 {
		t.Skipf("SKIP: %v", errs)
	}
}

// RequireRoot skips the test if it does not run as root.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: must be root")
	}
}

// RequireLoop skips the test if it cannot make loop devices.
func RequireLoop(t testing.TB) {
	t.Helper()
	RequireRoot(t)
	fd, err := unix.Open(loopControl, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("SKIP: no loop devices: %s: %v (modprobe loop; in a container, pass the device in)", loopControl, err)
	}
	_ = unix.Close(fd)
}

// RequireVM skips the test if it cannot build and run a VM.
func RequireVM(t testing.TB) {
	t.Helper()
	Require(t, "qemu-system-x86_64", "busybox", "mkfs.ext4", "apt-get", "apt-cache", "dpkg-deb", "depmod")
}
