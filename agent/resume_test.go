package agent_test

import (
	"context"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/store"
)

// backupCommand makes the test binary a slow backup with many checkpoints, to be killed:
// REPO DEV,PINS.
const backupCommand = "__backup"

func slowBackup(location, where string) error {
	dev, pins, _ := strings.Cut(where, ",")
	ctx := context.Background()
	repo, err := store.Open(ctx, location)
	if err != nil {
		return err
	}
	b := &bench{pins: pins}
	job := agent.Job{
		VM: "vm", Disks: []string{dev}, Repo: repo, Tool: "test", Quiesce: agent.Quiesce{Kind: "none"}, Source: b.source,
		Limits: agent.Limits{BytesPerSecond: 6 << 20}, Checkpoint: 10 * time.Millisecond,
	}
	_, err = job.Run(ctx)
	return err
}

// interrupt begins a backup in a process of its own and kills that when there is a new checkpoint.
func (b *bench) interrupt(t *testing.T) {
	t.Helper()
	notes := func() int {
		all, err := filepath.Glob(filepath.Join(b.repo.Location(), "partial/vm/*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	had := notes()
	c := exec.Command(os.Args[0], backupCommand, b.repo.Location(), b.dev+","+b.pins)
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); notes() < had+3; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			_ = c.Process.Kill()
			_ = c.Wait()
			t.Fatal("no checkpoint")
		}
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err == nil {
		t.Fatal("it had come to its end")
	}
}

// fill makes the whole disk random.
func (b *bench) fill(t *testing.T) {
	t.Helper()
	data := make([]byte, diskSize)
	_, _ = rand.Read(data)
	b.write(t, 0, data)
}

func TestInterruptedFullGoesOn(t *testing.T) {
	b := newBench(t)
	b.fill(t)
	b.interrupt(t)
	// In what was covered, and in what was not.
	b.write(t, 100, []byte("changed since"))
	b.write(t, diskSize-100, []byte("changed too"))
	b.interrupt(t)
	b.write(t, 64<<10, []byte("changed since the second time"))

	r := b.run(t)
	d := r.Point.Disks[0]
	if d.Tracking.Mode != "full" || d.Tracking.Resumed.IsZero() || len(d.Tracking.Reasons) > 0 {
		t.Errorf("%+v", d.Tracking)
	}
	// Both ends of the read: all of it once, and what changed once more.
	if d.Stats.Read < diskSize || d.Stats.Read > diskSize+(4*64<<10) {
		t.Errorf("read %d bytes in all", d.Stats.Read)
	}
	b.wantContent(t, r.Point)
	if report, err := b.repo.Verify(t.Context(), r.Point, true, nil); err != nil || !report.OK() {
		t.Errorf("%+v, %v", report.Problems, err)
	}

	b.write(t, 3<<20, []byte("later"))
	next := b.run(t)
	if d := next.Point.Disks[0]; d.Tracking.Mode != "tracked" || d.Stats.Read != 64<<10 || !d.Tracking.Resumed.IsZero() {
		t.Errorf("the next one: %+v, read %d", d.Tracking, d.Stats.Read)
	}
	b.wantContent(t, next.Point)
}

// Tracking that did not go on: everything is read again, and only what is missing is stored.
func TestInterruptedFullWithoutTracking(t *testing.T) {
	b := newBench(t)
	b.fill(t)
	b.interrupt(t)
	if err := bpf.Remove(b.pins); err != nil {
		t.Fatal(err)
	}
	b.write(t, 100, []byte("unseen"))
	r := b.run(t)
	d := r.Point.Disks[0]
	if d.Tracking.Mode != "full" || d.Tracking.Resumed.IsZero() || !strings.Contains(strings.Join(d.Tracking.Reasons, "; "), "read again") {
		t.Errorf("%+v", d.Tracking)
	}
	if d.Stats.Read <= diskSize || d.Stats.New > diskSize+64<<10 {
		t.Errorf("%+v", d.Stats)
	}
	b.wantContent(t, r.Point)
}

// An incremental that was interrupted goes on, too, and keeps its proof.
func TestInterruptedIncrementalGoesOn(t *testing.T) {
	b := newBench(t)
	b.run(t)
	b.fill(t)
	b.interrupt(t)
	b.write(t, 100, []byte("changed since"))
	r := b.run(t)
	d := r.Point.Disks[0]
	if d.Tracking.Mode != "tracked" || d.Tracking.Resumed.IsZero() || d.Stats.Read > diskSize+(2*64<<10) {
		t.Errorf("%+v, read %d", d.Tracking, d.Stats.Read)
	}
	b.wantContent(t, r.Point)
}
