package testvm_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/internal/qmp"
	testvm "github.com/tidemark/tidemark/test/vm"
)

func fetchKernel(t *testing.T) *testvm.Kernel {
	t.Helper()
	testvm.RequireVM(t)
	k, err := testvm.FetchKernel(t.Context(), testvm.KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func buildImage(t *testing.T, path string) {
	t.Helper()
	if err := testvm.BuildImage(t.Context(), path, 96<<20, testvm.ImageOptions{}); err != nil {
		t.Fatal(err)
	}
}

func attachLoop(t *testing.T, file string, opts testvm.LoopOptions) string {
	t.Helper()
	testvm.RequireLoop(t)
	dev, detach, err := testvm.AttachLoop(t.Context(), file, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := detach(); err != nil {
			t.Error(err)
		}
	})
	return dev
}

func start(t *testing.T, cfg testvm.Config) *testvm.VM {
	t.Helper()
	if cfg.Kernel == nil {
		cfg.Kernel = fetchKernel(t)
	}
	v, err := testvm.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Kill)
	return v
}

// show boots a disk in mode Show and returns what it holds.
func show(t *testing.T, disk testvm.Drive) testvm.Report {
	t.Helper()
	v := start(t, testvm.Config{Name: "show", Disk: disk, Mode: testvm.Show})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := v.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	r := v.Report()
	if !r.Booted || r.Mode != testvm.Show || r.Last < 0 {
		t.Fatalf("no report: %+v\n%v", r, v.Console())
	}
	return r
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

func TestWriterOnLoopDeviceSurvivesPowerFailure(t *testing.T) {
	img := filepath.Join(t.TempDir(), "disk.raw")
	buildImage(t, img)
	dev := attachLoop(t, img, testvm.LoopOptions{})
	sock := filepath.Join(shortTempDir(t), "qmp")
	v := start(t, testvm.Config{Name: "source", Disk: testvm.Drive{Device: dev}, Mode: testvm.Writer, PauseMs: 20, QMPSocket: sock})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := v.WaitWrote(ctx, 5); err != nil {
		t.Fatal(err)
	}

	c, err := qmp.Dial(ctx, sock, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := c.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	nodes, err := c.BlockNodes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	open := ""
	for _, n := range nodes {
		if p, ok := n.HostPath(); ok {
			open = fmt.Sprintf("%s direct=%v", p, n.Direct)
		}
	}
	if open != dev+" direct=true" {
		t.Fatalf("the guest's disk is %q, want %s opened directly", open, dev)
	}
	before := len(v.Console())
	if _, err := v.WaitLineAfter(shortly(t), before-1, regexp.MustCompile("wrote")); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a paused guest wrote on: %v", err)
	}
	if err := c.Cont(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := v.WaitLineAfter(ctx, before-1, regexp.MustCompile("wrote")); err != nil {
		t.Fatal(err)
	}

	v.Kill() // the guest is in the middle of something
	wrote := v.Report().Wrote
	if wrote < 6 {
		t.Fatalf("wrote %d", wrote)
	}
	r := show(t, testvm.Drive{Device: dev})
	if !r.Complete || r.Last < wrote || r.Last > wrote+1 || len(r.Bad)+len(r.Missing) > 0 {
		t.Fatalf("the guest had written %d, the disk has %+v", wrote, r)
	}
	t.Logf("wrote %d, found %+v", wrote, r)
}

// shortly is a context that ends after a moment, long enough for many rounds of
// a writer that does not pause.
func shortly(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// seqFile makes the content of a file as a writer's guest does.
func seqFile(n int, body string) string {
	return fmt.Sprintf("seq %06d %x\n%s", n, md5.Sum([]byte(body)), body)
}

func TestGuestFindsMissingAndDamagedFiles(t *testing.T) {
	img := filepath.Join(t.TempDir(), "disk.raw")
	files := map[string]string{
		"/data/seq-000001":     seqFile(1, "one\n"),
		"/data/seq-000003":     strings.Replace(seqFile(3, "three\n"), "three", "threE", 1),
		"/data/seq-000004":     seqFile(5, "the content of another\n"),
		"/data/seq-000007":     seqFile(7, ""),
		"/data/seq-000008":     "",
		"/data/seq-000009.new": "left over",
	}
	if err := testvm.BuildImage(t.Context(), img, testvm.MinImage, testvm.ImageOptions{Files: files}); err != nil {
		t.Fatal(err)
	}
	r := show(t, testvm.Drive{File: img, ReadOnly: true})
	if r.Last != 8 || r.Complete || !slices.Equal(r.Missing, []int{2, 5, 6}) || !slices.Equal(r.Bad, []int{3, 4, 8}) {
		t.Fatalf("got %+v", r)
	}
}

func TestBootFromNBDExport(t *testing.T) {
	testvm.Require(t, "qemu-nbd")
	dir := shortTempDir(t)
	img, sock := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "nbd")
	files := map[string]string{"/data/seq-000001": seqFile(1, "one\n")}
	if err := testvm.BuildImage(t.Context(), img, testvm.MinImage, testvm.ImageOptions{Files: files}); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	nbd := exec.Command("qemu-nbd", "-k", sock, "-x", "disk,0", "-f", "raw", "-t", "-r", img)
	nbd.Stderr = os.Stderr
	if err := nbd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = nbd.Process.Kill()
		_ = nbd.Wait()
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("qemu-nbd made no socket")
		}
	}
	// A writer on a snapshot may write although the export is read-only.
	v := start(t, testvm.Config{Disk: testvm.Drive{NBD: sock, Export: "disk,0", Snapshot: true}, Mode: testvm.Writer})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := v.WaitWrote(ctx, 2); err != nil {
		t.Fatal(err)
	}
	if err := v.Stop(); err != nil {
		t.Fatal(err)
	}
	if r := v.Report(); r.Last != 1 || !r.Complete {
		t.Fatalf("got %+v", r)
	}
	after, err := os.ReadFile(img)
	if err != nil || !bytes.Equal(before, after) {
		t.Fatalf("the image was changed (%v)", err)
	}
}

func TestWaitTellsWhyTheVMEnded(t *testing.T) {
	k := fetchKernel(t)
	v := start(t, testvm.Config{Kernel: k, Disk: testvm.Drive{File: "/nonexistent/disk"}, Accel: testvm.TCG})
	_, err := v.WaitLine(t.Context(), regexp.MustCompile("booted"))
	if !errors.Is(err, testvm.ErrEnded) || !strings.Contains(err.Error(), "/nonexistent/disk") {
		t.Fatalf("got %v, want ErrEnded with QEMU's own words", err)
	}
	if err := v.Wait(t.Context()); !errors.Is(err, testvm.ErrEnded) {
		t.Fatalf("got %v, want ErrEnded", err)
	}
}

func TestDriveMustBeOneThing(t *testing.T) {
	k := &testvm.Kernel{}
	for _, d := range []testvm.Drive{{}, {File: "a", NBD: "b"}} {
		if v, err := testvm.Start(t.Context(), testvm.Config{Kernel: k, Disk: d, Accel: testvm.TCG}); err == nil {
			v.Kill()
			t.Errorf("%+v was taken", d)
		}
	}
}

// TestVMDiesWithItsOwner kills a process that owns a VM. The process is this
// test binary, with the environment saying what to do.
func TestVMDiesWithItsOwner(t *testing.T) {
	k := fetchKernel(t)
	if img := os.Getenv("TIDEMARK_TEST_OWN_VM"); img != "" {
		v, err := testvm.Start(context.Background(), testvm.Config{Kernel: k, Disk: testvm.Drive{File: img}, Mode: testvm.Writer, Accel: testvm.TCG})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("owned %d\n", v.PID())
		<-v.Done()
		return
	}
	img := filepath.Join(t.TempDir(), "disk.raw")
	buildImage(t, img)
	owner := exec.Command(os.Args[0], "-test.run=^TestVMDiesWithItsOwner$")
	owner.Env = append(os.Environ(), "TIDEMARK_TEST_OWN_VM="+img)
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	for lines := bufio.NewScanner(out); pid == 0 && lines.Scan(); {
		_, _ = fmt.Sscanf(lines.Text(), "owned %d", &pid)
	}
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait()
	if pid == 0 {
		t.Fatal("no VM was started")
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		// It may stay as a zombie for as long as nobody takes in orphans.
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("QEMU lives on: %s", stat)
		}
	}
}
