package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// host is a loop device and a repository, and runs the binary with them.
type host struct {
	t    *testing.T
	dev  string
	repo string
	pins string
}

func newHost(t *testing.T, size int64) *host {
	t.Helper()
	testvm.RequireRoot(t)
	testvm.RequireLoop(t)
	h := &host{t: t, repo: filepath.Join(t.TempDir(), "repo"), pins: fmt.Sprintf("/sys/fs/bpf/tidemark-e2e-%d-%s", os.Getpid(), t.Name())}
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	dev, detach, err := testvm.AttachLoop(t.Context(), file, testvm.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = detach() })
	h.dev = dev
	t.Cleanup(func() { _ = h.command("untrack", "--all").Run() })
	h.run("init")
	return h
}

func (h *host) command(args ...string) *exec.Cmd {
	return exec.Command(binary, append(args, "-r", h.repo, "--pin-dir", h.pins, "--state-dir", h.repo+".state")...)
}

func (h *host) run(args ...string) []byte {
	h.t.Helper()
	c := h.command(args...)
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		h.t.Fatalf("tidemark %v: %v: %s", args, err, errs.Bytes())
	}
	return out
}

// The agent is killed in the middle of what it does, again and again, while
// the disk is written. The next one adopts what is pinned, and in the end the point
// is the disk.
func TestAgentKilledLosesNothing(t *testing.T) {
	testvm.Require(t, "fio")
	h := newHost(t, 64<<20)
	config := filepath.Join(t.TempDir(), "agent.yaml")
	yaml := fmt.Sprintf("repository: %s\nlisten: 127.0.0.1:0\nvms:\n  - name: vm\n    disks: [%s]\n    every: 1s\n    quiesce: none\n", h.repo, h.dev)
	if err := os.WriteFile(config, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run("backup", "vm", "--disk", h.dev)

	// Bursts, so that some backups find a quiet moment and some do not.
	fio := exec.Command("fio", "--name=w", "--filename="+h.dev, "--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--direct=1", "--ioengine=psync",
		"--thinktime=200ms", "--thinktime_blocks=20", "--time_based", "--runtime=300", "--norandommap", "--randrepeat=0")
	if err := fio.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = fio.Process.Signal(syscall.SIGTERM) })
	for range 8 {
		c := h.command("agent", "--config", config)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(100+rand.IntN(1500)) * time.Millisecond)
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = c.Wait()
	}
	// Not SIGKILL: that would leave fio's job processes writing.
	_ = fio.Process.Signal(syscall.SIGTERM)
	_ = fio.Wait()

	h.run("backup", "vm", "--disk", h.dev)
	var points []struct {
		Disks []struct {
			Tracking struct {
				Mode    string   `json:"mode"`
				Reasons []string `json:"reasons"`
			} `json:"tracking"`
		} `json:"disks"`
	}
	if err := json.Unmarshal(h.run("points", "vm", "--json"), &points); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d points", len(points))
	for _, p := range points[1:] {
		if p.Disks[0].Tracking.Mode != "tracked" {
			t.Errorf("not adopted: %+v", p.Disks[0].Tracking)
		}
	}
	h.run("verify")
	restored := filepath.Join(t.TempDir(), "restored")
	h.run("restore", "vm", "-o", restored)
	if out, err := exec.Command("cmp", restored, h.dev).CombinedOutput(); err != nil {
		t.Errorf("MISSED: the restored disk is not the disk: %v: %s", err, out)
	}
}

func TestAgentServesMetrics(t *testing.T) {
	h := newHost(t, 16<<20)
	config := filepath.Join(t.TempDir(), "agent.yaml")
	yaml := fmt.Sprintf("repository: %s\nlisten: 127.0.0.1:0\nvms:\n  - name: vm\n    disks: [%s]\n    every: 1s\n", h.repo, h.dev)
	if err := os.WriteFile(config, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	c := h.command("agent", "--config", config)
	log, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	var seen bytes.Buffer
	buf := make([]byte, 4096)
	address := regexp.MustCompile(`address=(\S+)`)
	for !address.Match(seen.Bytes()) || !bytes.Contains(seen.Bytes(), []byte("restore point")) {
		n, err := log.Read(buf)
		if err != nil {
			t.Fatalf("the agent ended: %s", seen.Bytes())
		}
		seen.Write(buf[:n])
	}
	go func() { _, _ = io.Copy(io.Discard, log) }()
	res, err := http.Get("http://" + string(address.FindSubmatch(seen.Bytes())[1]) + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`tidemark_last_point_timestamp_seconds{vm="vm"}`, `tidemark_backup_failures_total{vm="vm"} 0`, `tidemark_read_bytes_total{vm="vm"}`,
		"tidemark_tracker_attached 1", `tidemark_tracker_missed_events_total{copy="0",program="bio_queue"} `, `tidemark_tracker_unknown{device="`} {
		if !strings.Contains(string(body), want) {
			t.Errorf("metrics lack %s", want)
		}
	}
}
