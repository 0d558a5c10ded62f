package main

import (
	"os/exec"
	"testing"

	testvm "github.com/tidemark/tidemark/test/vm"
)

func runVMTest(t *testing.T, args ...string) (int, error) {
	t.Helper()
	testvm.RequireVM(t)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("SKIP: busybox is missing (apt install busybox-static)")
	}
	for i, a := range args {
		if a == "BUSYBOX" {
			args[i] = busybox
		}
	}
	return vmtest(t.Context(), args)
}

func TestExitIsThatOfTheFirstFailure(t *testing.T) {
	status, err := runVMTest(t, "-disk", "nvme:16", "BUSYBOX", "true", "--", "BUSYBOX", "sh", "-c", "[ -b /dev/nvme0n1 ] && exit 3", "--", "BUSYBOX", "false")
	if status != 3 || err != nil {
		t.Fatalf("status %d, %v; want 3", status, err)
	}
}

func TestPanicIs125(t *testing.T) {
	status, err := runVMTest(t, "BUSYBOX", "sh", "-c", "echo c > /proc/sysrq-trigger")
	if status != exitNoResult || err == nil {
		t.Fatalf("status %d, %v; want 125", status, err)
	}
}

func TestTimeoutIs124(t *testing.T) {
	status, err := runVMTest(t, "-timeout", "1s", "BUSYBOX", "sleep", "1000")
	if status != exitTimeout || err == nil {
		t.Fatalf("status %d, %v; want 124", status, err)
	}
}

func TestBadUsageIs2(t *testing.T) {
	for _, args := range [][]string{{}, {"-no-such-flag"}, {"-disk", "many", "x"}} {
		if status, _ := vmtest(t.Context(), args); status != exitFailure {
			t.Errorf("%q: status %d, want 2", args, status)
		}
	}
}
