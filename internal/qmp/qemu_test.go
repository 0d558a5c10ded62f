package qmp_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidemark/tidemark/internal/qmp"
)

// startQEMU runs a QEMU without a machine and returns the path of its monitor.
// It is paused and has no guest, which is enough for all that the protocol does.
func startQEMU(t *testing.T, args ...string) string {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("SKIP: qemu-system-x86_64 is missing (apt install qemu-system-x86)")
	}
	// Unix socket paths are short; t.TempDir may not be.
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	sock := filepath.Join(dir, "q")
	args = append([]string{
		"-M", "none", "-nodefaults", "-display", "none", "-S",
		"-qmp", "unix:" + sock + ",server=on,wait=off",
	}, args...)
	cmd := exec.Command(bin, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	deadline := time.Now().Add(20 * time.Second)
	for {
		_, err := os.Stat(sock)
		if err == nil {
			return sock
		}
		if !errors.Is(err, fs.ErrNotExist) || time.Now().After(deadline) {
			t.Fatalf("QEMU made no monitor socket: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func dial(t *testing.T, sock string) *qmp.Client {
	t.Helper()
	// The socket may exist for a moment before QEMU listens on it.
	deadline := time.Now().Add(20 * time.Second)
	for {
		c, err := qmp.Dial(t.Context(), sock, qmp.Options{Greeting: 20 * time.Second})
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
			return c
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestQEMUTellsItsVersion(t *testing.T) {
	c := dial(t, startQEMU(t))
	if c.Version().Major < 5 {
		t.Fatalf("version %v", c.Version())
	}
}

func TestStopAndContChangeTheStatus(t *testing.T) {
	c := dial(t, startQEMU(t))
	ctx := t.Context()
	want := func(state string) {
		t.Helper()
		got, err := c.Status(ctx)
		if err != nil || got != state {
			t.Fatalf("status %q, %v; want %q", got, err, state)
		}
	}
	want(qmp.StatusPrelaunch)
	if err := c.Cont(ctx); err != nil {
		t.Fatal(err)
	}
	want(qmp.StatusRunning)
	for range 2 { // twice: stopping what stands still is no error
		if err := c.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		want(qmp.StatusPaused)
	}
	for _, name := range []string{"RESUME", "STOP"} {
		if e := <-c.Events(); e.Name != name || time.Since(e.Time).Abs() > time.Minute {
			t.Fatalf("event %v, want %s", e, name)
		}
	}
}

func TestQEMURefusalIsTyped(t *testing.T) {
	c := dial(t, startQEMU(t))
	err := c.Execute(t.Context(), "no-such-command", nil, nil)
	var e *qmp.Error
	if !errors.As(err, &e) || e.Class != "CommandNotFound" || e.Command != "no-such-command" {
		t.Fatalf("got %v", err)
	}
	// The connection is still good.
	if _, err := c.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestBlockNodesNameTheHostFile(t *testing.T) {
	img := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(img, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c := dial(t, startQEMU(t,
		"-blockdev", "driver=file,node-name=f0,read-only=on,filename="+img,
		"-blockdev", "driver=raw,node-name=d0,read-only=on,file=f0"))
	nodes, err := c.BlockNodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]qmp.BlockNode{}
	for _, n := range nodes {
		byName[n.Name] = n
	}
	if p, ok := byName["f0"].HostPath(); !ok || p != img {
		t.Fatalf("f0 is %q, %v; want %q", p, ok, img)
	}
	if _, ok := byName["d0"].HostPath(); ok {
		t.Fatal("the raw format node opens no file itself")
	}
	if n := byName["f0"]; n.Size != 1<<20 || !n.ReadOnly {
		t.Fatalf("node %+v", n)
	}
}

func TestQueryBlockListsDrives(t *testing.T) {
	img := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(img, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c := dial(t, startQEMU(t, "-drive", "if=none,id=root,format=raw,file="+img))
	devs, err := c.QueryBlock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(devs) != 1 || devs[0].Device != "root" || devs[0].File != img || devs[0].Node == "" {
		t.Fatalf("got %+v", devs)
	}
}

func TestSecondClientIsToldBusy(t *testing.T) {
	sock := startQEMU(t)
	first := dial(t, sock)
	_, err := qmp.Dial(t.Context(), sock, qmp.Options{Greeting: 200 * time.Millisecond})
	if !errors.Is(err, qmp.ErrBusy) {
		t.Fatalf("got %v, want ErrBusy", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = qmp.Dial(ctx, sock, qmp.Options{})
	if !errors.Is(err, qmp.ErrBusy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want ErrBusy and the context's error", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	dial(t, sock) // free again
}

func TestQuitEndsTheConnection(t *testing.T) {
	c := dial(t, startQEMU(t))
	if err := c.Quit(t.Context()); err != nil && !errors.Is(err, qmp.ErrClosed) {
		t.Fatal(err)
	}
	<-c.Done()
	if !errors.Is(c.Err(), qmp.ErrClosed) {
		t.Fatalf("Err is %v", c.Err())
	}
	if _, err := c.Status(t.Context()); !errors.Is(err, qmp.ErrClosed) {
		t.Fatalf("got %v, want ErrClosed", err)
	}
	for e := range c.Events() { // closed in the end
		t.Logf("event %s", e.Name)
	}
}

func TestNobodyListens(t *testing.T) {
	_, err := qmp.Dial(t.Context(), filepath.Join(t.TempDir(), "none"), qmp.Options{})
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("got %v, want ErrNotExist", err)
	}
}
