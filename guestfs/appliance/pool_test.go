package appliance_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/guestfs/appliance"
)

// machines are the QEMU processes of this one.
func machines(t *testing.T) []int {
	t.Helper()
	out, _ := exec.Command("pgrep", "-P", strconv.Itoa(os.Getpid()), "-f", "tidemark-files").Output()
	var pids []int
	for f := range strings.FieldsSeq(string(out)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func small(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "src"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "src/hello"), []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(dir, "img")
	run(t, "truncate", "-s", "16M", img)
	run(t, "mkfs.ext4", "-q", "-d", filepath.Join(dir, "src"), img)
	return img
}

// hello reads the file of a small image.
func hello(t *testing.T, d *appliance.Disk) error {
	t.Helper()
	tree, err := d.Tree(t.Context(), "whole")
	if err != nil {
		return err
	}
	f, err := tree.Open(t.Context(), "hello")
	if err != nil {
		return err
	}
	b := make([]byte, 6)
	if _, err := f.ReadAtContext(t.Context(), b, 0); err != nil {
		return err
	}
	if string(b) != "hello\n" {
		t.Errorf("read %q", b)
	}
	return nil
}

// TestMachineDies kills an appliance while its disk is used: that is an error, and the next question starts another.
func TestMachineDies(t *testing.T) {
	c := config(t)
	d := newPool(t, c).Disk("a", image(small(t)))
	if err := hello(t, d); err != nil {
		t.Fatal(err)
	}
	pids := machines(t)
	if len(pids) != 1 {
		t.Fatalf("%d machines", len(pids))
	}
	if os.Getuid() == 0 {
		st, err := os.ReadFile("/proc/" + strconv.Itoa(pids[0]) + "/status")
		if err != nil || !strings.Contains(string(st), "\nUid:\t65534\t65534") || !strings.Contains(string(st), "\nSeccomp:\t2") {
			t.Errorf("QEMU has privileges: %v\n%s", err, st)
		}
	}
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	err := hello(t, d)
	if err != nil && !errors.Is(err, guestfs.ErrLost) {
		t.Errorf("got %v", err)
	}
	t.Logf("told: %v", err)
	if err := hello(t, d); err != nil {
		t.Errorf("after it was started again: %v", err)
	}
}

// TestBoundedAndIdle has two disks take turns on one appliance, which ends when nobody needs it.
func TestBoundedAndIdle(t *testing.T) {
	c := config(t)
	c.Most, c.Idle = 1, 2*time.Second
	pool := newPool(t, c)
	for _, name := range []string{"a", "b"} {
		if err := hello(t, pool.Disk(name, image(small(t)))); err != nil {
			t.Fatal(err)
		}
		if n := len(machines(t)); n > 1 {
			t.Errorf("%d machines", n)
		}
	}
	for began := time.Now(); pool.Running() > 0 || len(machines(t)) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			t.Fatal("the appliance does not end")
		}
	}
}

// TestNoKernel says what to install.
func TestNoKernel(t *testing.T) {
	d := newPool(t, appliance.Config{Kernel: "/nowhere/vmlinuz-1"}).Disk("a", image("/dev/null"))
	if _, err := d.Volumes(t.Context()); !errors.Is(err, appliance.ErrNoKernel) {
		t.Errorf("got %v", err)
	}
}
