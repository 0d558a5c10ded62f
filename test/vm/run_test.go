package testvm_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// TestInGuest does nothing unless it runs in a guest, where the environment
// says how it shall end.
func TestInGuest(t *testing.T) {
	if os.Getenv("TIDEMARK_TESTVM") == "" {
		t.Skip("SKIP: runs only in a guest of TestRunReportsEachExit")
	}
	if os.Getenv("FATE") == "fail" {
		t.Fatal("failed as told")
	}
}

func shell(t *testing.T, script string) testvm.Program {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("SKIP: busybox is missing (apt install busybox-static)")
	}
	return testvm.Program{Path: busybox, Args: []string{"sh", "-c", script}}
}

func logged(res *testvm.Result, text string) bool {
	return slices.ContainsFunc(res.Log, func(l testvm.Line) bool { return strings.Contains(l.Text, text) })
}

func TestRunReportsEachExit(t *testing.T) {
	k := fetchKernel(t)
	self := []string{"-test.v", "-test.run=^TestInGuest$"}
	res, err := testvm.RunInKernel(t.Context(), testvm.Run{
		Kernel: k,
		Programs: []testvm.Program{
			{Path: os.Args[0], Args: self},
			{Path: os.Args[0], Args: self, Env: []string{"FATE=fail"}},
			shell(t, `printf "it's no line end"; exit 7`),
			shell(t, "uname -r; grep -q bpf /proc/mounts && ip link show lo | grep -q UP"),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(res.Exits, []int{0, 1, 7, 0}) || res.Exit() != 1 {
		t.Fatalf("exits %v, want 0 1 7 0\n%v", res.Exits, res.Log)
	}
	for _, want := range []string{"--- PASS: TestInGuest", "--- FAIL: TestInGuest", "failed as told", k.Release} {
		if !logged(res, want) {
			t.Errorf("the log has no %q", want)
		}
	}
}

func TestRunWithModulesDisksToolsAndFiles(t *testing.T) {
	testvm.Require(t, "dmsetup")
	k := fetchKernel(t)
	file := makeFile(t, 12345)
	res, err := testvm.RunInKernel(t.Context(), testvm.Run{
		Kernel:  k,
		Modules: append(testvm.DefaultModules(), "dm-mod", "null_blk nr_devices=3 gb=1"),
		Tools:   []string{"dmsetup"},
		Files:   map[string]string{"/srv/a/file": file},
		Disks:   []testvm.ScratchDisk{{Size: 32 << 20}, {Size: 16 << 20, Bus: testvm.NVMe}},
		Programs: []testvm.Program{
			shell(t, "blockdev --getsize64 /dev/vda | grep -qx 33554432"),
			shell(t, "blockdev --getsize64 /dev/nvme0n1 | grep -qx 16777216"),
			shell(t, "[ -b /dev/nullb2 ]"),
			shell(t, "echo 0 65536 linear /dev/vda 0 | dmsetup create lin && [ -b /dev/mapper/lin ]"),
			shell(t, "stat -c %s /srv/a/file | grep -qx 12345"),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(res.Exits, []int{0, 0, 0, 0, 0}) {
		t.Fatalf("exits %v\n%v", res.Exits, res.Log)
	}
}

func TestPanicIsNoResult(t *testing.T) {
	res, err := testvm.RunInKernel(t.Context(), testvm.Run{
		Kernel:   fetchKernel(t),
		Programs: []testvm.Program{shell(t, "true"), shell(t, "echo c > /proc/sysrq-trigger; sleep 1000")},
	})
	if !errors.Is(err, testvm.ErrNoResult) || !strings.Contains(err.Error(), "kernel panic: not syncing: sysrq") {
		t.Fatalf("got %v, want ErrNoResult with the panic", err)
	}
	if !slices.Equal(res.Exits, []int{0}) {
		t.Fatalf("exits %v, want that of the first program", res.Exits)
	}
}

// watcher calls found when text has been written to it.
type watcher struct {
	text  string
	found func()
	seen  strings.Builder
}

func (w *watcher) Write(p []byte) (int, error) {
	w.seen.Write(p)
	if strings.Contains(w.seen.String(), w.text) {
		w.found()
	}
	return len(p), nil
}

func TestRunEndsWithItsContext(t *testing.T) {
	k := fetchKernel(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	res, err := testvm.RunInKernel(ctx, testvm.Run{
		Kernel:   k,
		Programs: []testvm.Program{shell(t, "echo here I hang; sleep 1000")},
		Console:  &watcher{text: "here I hang", found: cancel},
	})
	if !errors.Is(err, context.Canceled) || errors.Is(err, testvm.ErrNoResult) {
		t.Fatalf("got %v, want the context's error", err)
	}
	if !logged(res, "here I hang") || len(res.Exits) != 0 {
		t.Fatalf("result %+v", res)
	}
}

func TestUnknownModuleIsAnError(t *testing.T) {
	_, err := testvm.RunInKernel(t.Context(), testvm.Run{
		Kernel: fetchKernel(t), Accel: testvm.TCG,
		Modules: []string{"no_such_module"}, Programs: []testvm.Program{shell(t, "true")},
	})
	if err == nil || !strings.Contains(err.Error(), "no_such_module") {
		t.Fatalf("got %v", err)
	}
}

func TestRunKeepsADiskOfTheCallers(t *testing.T) {
	k := fetchKernel(t)
	disk := makeFile(t, 1<<20)
	res, err := testvm.RunInKernel(t.Context(), testvm.Run{
		Kernel: k, Modules: append(testvm.DefaultModules(), "virtio_scsi", "sd_mod"), Optional: []string{"no_such_module", "dm-mod"},
		Disks: []testvm.ScratchDisk{{Path: disk}, {Size: 16 << 20, Bus: testvm.SCSI}},
		Programs: []testvm.Program{
			shell(t, "printf 'from the guest' | dd of=/dev/vda bs=512 conv=fsync,notrunc"),
			shell(t, "blockdev --getsize64 /dev/sda | grep -qx 16777216"),
			shell(t, "grep -q device-mapper /proc/devices"),
		},
	})
	if err != nil || !slices.Equal(res.Exits, []int{0, 0, 0}) {
		t.Fatalf("exits %v, %v\n%v", res.Exits, err, res.Log)
	}
	if !slices.Equal(res.Missing, []string{"no_such_module"}) {
		t.Errorf("missing modules: %v", res.Missing)
	}
	if b, err := os.ReadFile(disk); err != nil || !strings.HasPrefix(string(b), "from the guest") {
		t.Errorf("the file holds %.20q, %v", b, err)
	}
}
