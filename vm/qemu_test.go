package vm_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/internal/qmp"
	testvm "github.com/tidemark/tidemark/test/vm"
	"github.com/tidemark/tidemark/vm"
)

// newQEMU makes a driver whose machines end with the test.
func newQEMU(t *testing.T) *vm.QEMU {
	t.Helper()
	testvm.Require(t, "qemu-system-x86_64")
	q := &vm.QEMU{Dir: shortTempDir(t), Accel: "tcg"}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		folders, err := os.ReadDir(q.Dir)
		if err != nil {
			t.Error(err)
		}
		for _, f := range folders {
			name := strings.NewReplacer("%20", " ", "%2C", ",").Replace(f.Name())
			if err := q.Stop(ctx, name); err != nil && !errors.Is(err, vm.ErrNotDefined) {
				t.Error(err)
			}
		}
	})
	return q
}

func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// serveNBD exports a file by qemu-nbd and returns the socket.
func serveNBD(t *testing.T, file string) string {
	t.Helper()
	testvm.Require(t, "qemu-nbd")
	sock := filepath.Join(shortTempDir(t), "nbd")
	nbd := exec.Command("qemu-nbd", "-k", sock, "-x", "root", "-f", "raw", "-t", "-e", "4", file)
	nbd.Stderr = os.Stderr
	if err := nbd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = nbd.Process.Kill()
		_ = nbd.Wait()
	})
	waitFor(t, "qemu-nbd's socket", func() bool {
		_, err := os.Stat(sock)
		return err == nil
	})
	return sock
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func emptyDisk(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func wantState(t *testing.T, q *vm.QEMU, name string, want vm.State) {
	t.Helper()
	if got, err := q.State(t.Context(), name); err != nil || got != want {
		t.Fatalf("state %q, %v; want %q", got, err, want)
	}
}

func TestQEMUBootsAGuestFromNBD(t *testing.T) {
	testvm.RequireVM(t)
	k, err := testvm.FetchKernel(t.Context(), testvm.KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(t.TempDir(), "disk.raw")
	if err := testvm.BuildImage(t.Context(), img, testvm.MinImage, testvm.ImageOptions{}); err != nil {
		t.Fatal(err)
	}
	q := newQEMU(t)
	cfg := vm.Config{
		Version: vm.FormatVersion, Name: "standby", CPUs: 1, Memory: 256 << 20, Clock: vm.UTC,
		Firmware: vm.Firmware{
			Type: vm.Kernel, Kernel: k.Image,
			CommandLine: "console=ttyS0 quiet root=/dev/nvme0n1 rootfstype=ext4 init=/init tidemark.mode=show",
		},
		Disks: []vm.Disk{{Name: "disk0", Bus: vm.NVMe}},
	}
	disks := map[string]vm.Backing{"disk0": {NBD: serveNBD(t, img), Export: "root"}}
	if err := q.Define(t.Context(), cfg, disks); err != nil {
		t.Fatal(err)
	}
	wantState(t, q, "standby", vm.Off)
	if err := q.Start(t.Context(), "standby"); err != nil {
		t.Fatal(err)
	}
	wantState(t, q, "standby", vm.Running)
	waitFor(t, "the guest's report", func() bool {
		b, err := os.ReadFile(q.Console("standby"))
		return err == nil && bytes.Contains(b, []byte("TIDEMARK-GUEST complete 0"))
	})
	// The guest powers itself off.
	waitFor(t, "its end", func() bool {
		state, err := q.State(t.Context(), "standby")
		if err != nil {
			t.Fatal(err)
		}
		return state == vm.Off
	})
}

// TestQEMUHasAllDevices starts a machine without anything to boot and asks
// QEMU what it has got.
func TestQEMUHasAllDevices(t *testing.T) {
	q := newQEMU(t)
	cfg := webServer()
	sock := serveNBD(t, emptyDisk(t))
	disks := map[string]vm.Backing{}
	for _, d := range cfg.Disks {
		disks[d.Name] = vm.Backing{NBD: sock, Export: "root", ReadOnly: d.Bus == vm.Virtio}
	}
	if err := q.Define(t.Context(), cfg, disks); err != nil {
		t.Fatal(err)
	}
	if err := q.Start(t.Context(), cfg.Name); err != nil {
		t.Fatal(err)
	}
	// Another driver on the same folder finds it, as after a restart.
	wantState(t, &vm.QEMU{Dir: q.Dir}, cfg.Name, vm.Running)

	c, err := qmp.Dial(t.Context(), q.Monitor(cfg.Name), qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	devs, err := c.QueryBlock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, d := range devs {
		got[d.Node] = d.QDev
	}
	for i := range cfg.Disks {
		id := "disk" + string(rune('0'+i))
		if !strings.Contains(got[id], id+"-device") {
			t.Errorf("%s is at %q, all: %v", id, got[id], got)
		}
	}
	var nics []struct {
		Name string `json:"name"`
		MAC  string `json:"main-mac"`
	}
	if err := c.Execute(t.Context(), "query-rx-filter", nil, &nics); err != nil {
		t.Fatal(err)
	}
	if len(nics) != 1 || nics[0].MAC != cfg.NICs[0].MAC {
		t.Errorf("NICs %+v", nics)
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil { // one client at a time
		t.Fatal(err)
	}
	wantState(t, q, cfg.Name, vm.Paused)
}

// tiny is a machine without anything to boot.
func tiny(name string) vm.Config {
	return vm.Config{
		Version: vm.FormatVersion, Name: name, CPUs: 1, Memory: 16 << 20, Clock: vm.UTC,
		Firmware: vm.Firmware{Type: vm.BIOS},
	}
}

func TestRunningMachineIsNotChanged(t *testing.T) {
	q, ctx := newQEMU(t), t.Context()
	if err := q.Define(ctx, tiny("a"), nil); err != nil {
		t.Fatal(err)
	}
	if err := q.Start(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"Start":    q.Start(ctx, "a"),
		"Define":   q.Define(ctx, tiny("a"), nil),
		"Undefine": q.Undefine(ctx, "a"),
	} {
		if !errors.Is(err, vm.ErrRunning) {
			t.Errorf("%s: got %v, want ErrRunning", what, err)
		}
	}
	for range 2 { // stopping what is off changes nothing
		if err := q.Stop(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		wantState(t, q, "a", vm.Off)
	}
	if err := q.Undefine(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(q.Dir); err != nil || len(left) > 0 {
		t.Fatalf("left: %v (%v)", left, err)
	}
}

func TestUnknownMachine(t *testing.T) {
	q, ctx := newQEMU(t), t.Context()
	_, stateErr := q.State(ctx, "nobody")
	for what, err := range map[string]error{
		"Start": q.Start(ctx, "nobody"), "Stop": q.Stop(ctx, "nobody"),
		"Undefine": q.Undefine(ctx, "nobody"), "State": stateErr,
	} {
		if !errors.Is(err, vm.ErrNotDefined) {
			t.Errorf("%s: got %v, want ErrNotDefined", what, err)
		}
	}
	if err := q.Start(ctx, "../nobody"); !errors.Is(err, vm.ErrInvalid) {
		t.Errorf("got %v, want ErrInvalid", err)
	}
}

func TestStartTellsWhatQEMUSays(t *testing.T) {
	q, ctx := newQEMU(t), t.Context()
	cfg := tiny("a")
	cfg.Disks = []vm.Disk{{Name: "disk0", Bus: vm.Virtio}}
	if err := q.Define(ctx, cfg, map[string]vm.Backing{"disk0": {NBD: "/nonexistent/nbd"}}); err != nil {
		t.Fatal(err)
	}
	if err := q.Start(ctx, "a"); err == nil || !strings.Contains(err.Error(), "/nonexistent/nbd") {
		t.Fatalf("got %v", err)
	}
	wantState(t, q, "a", vm.Off)
}

func TestStartThatHangsIsGivenUp(t *testing.T) {
	q := newQEMU(t)
	sock := filepath.Join(shortTempDir(t), "nbd")
	mute, err := net.Listen("unix", sock) // takes connections into its backlog and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }()
	cfg := tiny("a")
	cfg.Disks = []vm.Disk{{Name: "disk0", Bus: vm.Virtio}}
	if err := q.Define(t.Context(), cfg, map[string]vm.Backing{"disk0": {NBD: sock}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		conn, err := mute.Accept() // QEMU is there, and waits for a greeting
		cancel()
		if err == nil {
			_, _ = conn.Read(make([]byte, 1)) // until QEMU is gone
			_ = conn.Close()
		}
	}()
	if err := q.Start(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want Canceled", err)
	}
	waitFor(t, "QEMU's end", func() bool { return !runs(t, q.Dir) })
	wantState(t, q, "a", vm.Off)
}

// runs tells whether a process has text in its arguments.
func runs(t *testing.T, text string) bool {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(text)) {
			return true
		}
	}
	return false
}

func TestQEMURefusesWhatItCannotExpress(t *testing.T) {
	q := newQEMU(t)
	nbd := vm.Backing{NBD: "/run/nbd"}
	for name, test := range map[string]struct {
		spoil func(*vm.Config, map[string]vm.Backing)
		want  error
	}{
		"UEFI": {func(c *vm.Config, _ map[string]vm.Backing) { c.Firmware.Type = vm.UEFI }, vm.ErrUnsupported},
		"seventh SATA disk": {func(c *vm.Config, b map[string]vm.Backing) {
			for _, n := range []string{"a", "b", "c", "d", "e", "f", "g"} {
				c.Disks = append(c.Disks, vm.Disk{Name: n, Bus: vm.SATA})
				b[n] = nbd
			}
		}, vm.ErrUnsupported},
		"no backing":       {func(c *vm.Config, _ map[string]vm.Backing) { c.Disks = []vm.Disk{{Name: "a", Bus: vm.SATA}} }, vm.ErrInvalid},
		"backing too many": {func(_ *vm.Config, b map[string]vm.Backing) { b["a"] = nbd }, vm.ErrInvalid},
		"two places": {func(c *vm.Config, b map[string]vm.Backing) {
			c.Disks = []vm.Disk{{Name: "a", Bus: vm.SATA}}
			b["a"] = vm.Backing{NBD: "/run/nbd", Device: "/dev/vda"}
		}, vm.ErrInvalid},
		"relative path": {func(c *vm.Config, b map[string]vm.Backing) {
			c.Disks = []vm.Disk{{Name: "a", Bus: vm.SATA}}
			b["a"] = vm.Backing{NBD: "nbd"}
		}, vm.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			c, b := tiny("a"), map[string]vm.Backing{}
			test.spoil(&c, b)
			if err := q.Define(t.Context(), c, b); !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			if _, err := q.State(t.Context(), "a"); !errors.Is(err, vm.ErrNotDefined) {
				t.Fatalf("it was defined: %v", err)
			}
		})
	}
}

func TestDeviceBacking(t *testing.T) {
	testvm.RequireLoop(t)
	dev, detach, err := testvm.AttachLoop(t.Context(), emptyDisk(t), testvm.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := detach(); err != nil {
			t.Error(err)
		}
	})
	q := newQEMU(t) // its cleanup runs first
	cfg := tiny("a")
	cfg.Disks = []vm.Disk{{Name: "disk0", Bus: vm.Virtio}}
	if err := q.Define(t.Context(), cfg, map[string]vm.Backing{"disk0": {Device: dev}}); err != nil {
		t.Fatal(err)
	}
	if err := q.Start(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	c, err := qmp.Dial(t.Context(), q.Monitor("a"), qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	nodes, err := c.BlockNodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(nodes) != 1 || nodes[0].File != dev || !nodes[0].Direct {
		t.Fatalf("nodes %+v, want %s past the page cache", nodes, dev)
	}
}
