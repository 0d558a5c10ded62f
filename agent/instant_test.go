package agent

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// scripted is a Source whose deltas are given, and whose counters never stand still.
type scripted struct {
	size   int64
	deltas []cbt.Extents
	quiet  bool
	swaps  []time.Time
	writes uint64
}

func (s *scripted) Changes(context.Context, cbt.ChangeID) (cbt.Delta, error) {
	d := cbt.Delta{Evidence: cbt.Evidence{Method: "test", Size: s.size}}
	if n := len(s.swaps); n < len(s.deltas) {
		d.Extents = s.deltas[n]
	}
	s.swaps = append(s.swaps, time.Now())
	return d, nil
}

func (s *scripted) Quiet() (bool, cbt.Evidence, error) {
	return s.quiet, cbt.Evidence{Method: "test", Size: s.size}, nil
}

func (s *scripted) Prepare() error { return nil }

func (s *scripted) Commit(cbt.ChangeID) error { return nil }

func (s *scripted) Writes() (uint64, error) {
	s.writes++
	return s.writes, nil
}

func (s *scripted) Close() error { return nil }

// inert pauses nothing.
type inert struct{}

func (inert) Method() string                        { return "inert" }
func (inert) Consistency() store.Consistency        { return store.Crash }
func (inert) Prepare(context.Context) error         { return nil }
func (inert) Running(context.Context) (bool, error) { return false, nil }
func (inert) Flush(context.Context) error           { return nil }
func (inert) Pause(context.Context) error           { return nil }
func (inert) Resume(context.Context) error          { return nil }
func (inert) Close() error                          { return nil }
func (inert) rescue() rescue                        { return rescue{} }

// newScripted is a disk of a point that is being made.
func newScripted(t *testing.T, src *scripted) *disk {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, src.size), 0o600); err != nil {
		t.Fatal(err)
	}
	repo, err := store.Init(t.Context(), filepath.Join(t.TempDir(), "repo"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = repo.Close() })
	w, err := repo.Begin(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Abort() })
	dev, err := openDevice(file)
	if err != nil {
		t.Fatal(err)
	}
	dev.lane = &lane{Pipeline: NewPipeline(Limits{})}
	d := &disk{device: dev, name: "disk0", src: src, grain: store.DefaultGrain}
	t.Cleanup(func() { _ = d.close() })
	if d.out, err = w.Disk(t.Context(), store.DiskOptions{Name: d.name, Source: file, Size: src.size, Grain: store.DefaultGrain}); err != nil {
		t.Fatal(err)
	}
	return d
}

// A quiet disk is read once, and its epoch is swapped no second time for the proof. It takes all
// disks to be quiet.
func TestQuietInstant(t *testing.T) {
	for _, c := range []struct {
		name         string
		quiet        [2]bool
		swaps, sawIt int
	}{{"both", [2]bool{true, true}, 0, 1}, {"one", [2]bool{true, false}, 1, 1}} {
		t.Run(c.name, func(t *testing.T) {
			var disks []*disk
			for _, q := range c.quiet {
				disks = append(disks, newScripted(t, &scripted{size: 1 << 20, quiet: q}))
			}
			run := &convergence{disks: disks}
			if err := run.rounds(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, d := range disks {
				if n := len(d.src.(*scripted).swaps); n != c.swaps || len(d.evidence) != c.sawIt {
					t.Errorf("%d swaps, evidence %+v", n, d.evidence)
				}
			}
			if run.quiesce.Method != "quiet" {
				t.Errorf("method %q", run.quiesce.Method)
			}
		})
	}
}

// After a pause in vain, the quiet instant is not older than the pause's swap: what was
// written before that swap is in the point.
func TestInstantAfterAPauseInVain(t *testing.T) {
	const size = 1 << 20
	src := &scripted{size: size, deltas: []cbt.Extents{{{Off: 0, Len: 4096}}}}
	d := newScripted(t, src)
	c := &convergence{job: Job{PauseBudget: time.Minute}, disks: []*disk{d}, pauser: inert{}}
	if err := c.rounds(t.Context()); err != nil {
		t.Fatal(err)
	}
	// One swap, that of the pause, and one that finds nothing.
	if len(src.swaps) != 3 || c.quiesce.Method != "quiet" || c.pauses != 1 {
		t.Fatalf("%d swaps, %d pauses, method %q; want 3, 1, quiet", len(src.swaps), c.pauses, c.quiesce.Method)
	}
	if c.instant.Before(src.swaps[1]) || c.instant.After(src.swaps[2]) {
		t.Errorf("the instant is %v after the pause's swap, want one between it and the next, %v later", c.instant.Sub(src.swaps[1]), src.swaps[2].Sub(src.swaps[1]))
	}
}
