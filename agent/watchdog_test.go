package agent_test

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidemark/tidemark/internal/qmp"
)

// qemu starts a QEMU with no guest in it, whose machine runs all the same.
func qemu(t *testing.T) (socket string) {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("SKIP: no qemu-system-x86_64 (apt-get install qemu-system-x86)")
	}
	socket = filepath.Join(t.TempDir(), "qmp")
	c := exec.Command(bin, "-M", "none", "-nodefaults", "-display", "none", "-qmp", "unix:"+socket+",server=on,wait=off")
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	wantStatus(t, socket, qmp.StatusRunning)
	return socket
}

// wantStatus waits until the guest has the status.
func wantStatus(t *testing.T, socket, want string) {
	t.Helper()
	var last any
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		c, err := qmp.Dial(ctx, socket, qmp.Options{})
		last = err
		if err == nil {
			var s string
			s, err = c.Status(ctx)
			last = s
			_ = c.Close()
		}
		cancel()
		if err == nil && last == want {
			return
		}
	}
	t.Fatalf("the guest is %v, want %s", last, want)
}

// hang starts a process that pauses the guest and hangs.
func hang(t *testing.T, socket, limit string) *exec.Cmd {
	t.Helper()
	c := exec.Command(os.Args[0], hangCommand, socket, limit)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "paused\n" {
		t.Fatalf("%q %v", line, err)
	}
	return c
}

func TestGuestIsResumedWhenTheBackupIsKilled(t *testing.T) {
	socket := qemu(t)
	c := hang(t, socket, "1h")
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
	wantStatus(t, socket, qmp.StatusRunning)
}

func TestGuestIsResumedWhenTheBackupHangs(t *testing.T) {
	socket := qemu(t)
	c := hang(t, socket, "300ms")
	if err := c.Wait(); err == nil || c.ProcessState.ExitCode() != -1 {
		t.Errorf("the hanging process ended with %v, want a kill", err)
	}
	wantStatus(t, socket, qmp.StatusRunning)
}
