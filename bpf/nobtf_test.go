package bpf

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// On a kernel without BTF nothing is attached, and everybody is told why.
func TestOpenWithoutBTF(t *testing.T) {
	const inChild = "TIDEMARK_TEST_NOBTF"
	if os.Getenv(inChild) == "" {
		if os.Geteuid() != 0 {
			t.Skip("SKIP: hiding BTF needs root")
		}
		// In a mount namespace of its own, an empty file system hides it.
		c := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		c.Env = append(os.Environ(), inChild+"=1")
		c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
		out, err := c.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	if err := unix.Mount("none", "/sys/kernel/btf", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	dir := testDir(t)
	if tr, err := Open(Options{Dir: dir}); !errors.Is(err, ErrNoBTF) {
		t.Errorf("got %v, %v", tr, err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("it left a directory")
	}
	found := false
	for _, c := range Probe() {
		if errors.Is(c.Err, ErrNoBTF) {
			found = true
		}
	}
	if !found {
		t.Errorf("no check of %v names BTF", Probe())
	}
}

// A kernel that is too old is named by doctor, and nothing is tracked on it.
func TestOldKernelIsRefused(t *testing.T) {
	if !kernelBefore(5, 17) {
		t.Skip("SKIP: this kernel is not too old (make matrix runs it under one that is)")
	}
	dir := testDir(t)
	if tr, err := Open(Options{Dir: dir}); !errors.Is(err, ErrOldKernel) {
		t.Errorf("got %v, %v", tr, err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("it left a directory")
	}
	c := Probe()[0]
	if c.Err == nil || !strings.Contains(c.Err.Error(), "too old") {
		t.Errorf("the check of the kernel says %v", c.Err)
	}
}
