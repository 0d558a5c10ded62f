package cbt_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

func open(t *testing.T, o bpf.Options, dev string) *cbt.Tracked {
	t.Helper()
	tr, err := bpf.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tr.Close() })
	s, err := cbt.OpenTracked(tr, dev, bpf.DefaultGranuleShift)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func changes(t *testing.T, s cbt.Source, since cbt.ChangeID) cbt.Delta {
	t.Helper()
	d, err := s.Changes(t.Context(), since)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func write(t *testing.T, dev string, off int64) {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt([]byte("changed"), off); err != nil {
		t.Fatal(err)
	}
}

// wantUnknown checks that d covers the whole disk and says why.
func wantUnknown(t *testing.T, d cbt.Delta, size int64, why string) {
	t.Helper()
	if d.Extents.Bytes() != size {
		t.Errorf("extents cover %d of %d bytes", d.Extents.Bytes(), size)
	}
	if len(d.Unknown) == 0 || !strings.Contains(strings.Join(d.Unknown, "; "), why) {
		t.Errorf("unknown because %q, want %q", d.Unknown, why)
	}
}

const small = 8 << 20

func TestChangesHoldsWhatWasWritten(t *testing.T) {
	dev := loopDevice(t, small, "")
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	write(t, dev, 1<<20)
	write(t, dev, 5<<20-3) // across two granules
	d := changes(t, s, id)
	want := cbt.Extents{{Off: 1 << 20, Len: 64 << 10}, {Off: 5<<20 - 64<<10, Len: 128 << 10}}
	if len(d.Unknown) > 0 || len(d.Extents) != 2 || d.Extents[0] != want[0] || d.Extents[1] != want[1] {
		t.Errorf("got %v, unknown %v; want %v", d.Extents, d.Unknown, want)
	}
	if d2 := changes(t, s, d.ID); len(d2.Extents) != 0 {
		t.Errorf("nothing was written, got %v", d2.Extents)
	}
	// Not committed: asked again, the old change is there still.
	if d3 := changes(t, s, id); d3.Extents.Bytes() != 192<<10 {
		t.Errorf("asked again: %v", d3.Extents)
	}
}

func TestManyFailedBackupsLoseNothing(t *testing.T) {
	dev := loopDevice(t, small, "")
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	for i := range 20 {
		write(t, dev, int64(i)*128<<10)
		changes(t, s, id)
	}
	d := changes(t, s, id)
	if len(d.Extents) != 20 || len(d.Unknown) > 0 {
		t.Errorf("%d extents, unknown %v; want 20", len(d.Extents), d.Unknown)
	}
}

func TestUnknownFirst(t *testing.T) {
	dev := loopDevice(t, small, "")
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	wantUnknown(t, changes(t, s, cbt.ChangeID{}), small, "no earlier instant")
}

func TestUnknownAfterDetach(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins, Copies: 3}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID

	// While a process holds the tracker, the link lives on, but can't be believed.
	if err := os.Remove(filepath.Join(pins, "gen-1", "link-rq_complete_1")); err != nil {
		t.Fatal(err)
	}
	d := changes(t, s, id)
	wantUnknown(t, d, small, "detached")
	_ = s.Close()

	// The next process finds it gone and begins anew.
	s = open(t, bpf.Options{Dir: pins}, dev)
	d = changes(t, s, id)
	wantUnknown(t, d, small, "program rq_complete_1 was detached")
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
		t.Errorf("after the new beginning it is unknown still: %v", d.Unknown)
	}
}

// However tracepoints are called: an event that every copy missed is one that no note tells of.
func TestUnknownAfterMissedEvents(t *testing.T) {
	for _, preemptible := range []bool{false, true} {
		t.Run(fmt.Sprint("preemptible=", preemptible), func(t *testing.T) {
			dev := loopDevice(t, small, "")
			var l lossy
			s := open(t, bpf.Options{Dir: pinDir(t), Copies: 3, Preemptible: preemptible, Misses: l.besides}, dev)
			id := changes(t, s, cbt.ChangeID{}).ID

			l.extra[3], l.extra[4] = 7, 7 // two of the three copies: the third saw all
			d := changes(t, s, id)
			if len(d.Unknown) > 0 {
				t.Errorf("two copies missed events, one did not: unknown because %v", d.Unknown)
			}
			id = d.ID
			l.extra[3]++
			l.extra[4]++
			l.extra[5]++
			d = changes(t, s, id)
			wantUnknown(t, d, small, "dropped tracing events")
			if d.Evidence.LeastMisses[1] != 1 {
				t.Errorf("least misses %v", d.Evidence.LeastMisses)
			}
			if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
				t.Errorf("the epoch after the loss is unknown too: %v", d.Unknown)
			}
		})
	}
}

func TestUnknownAfterReplacement(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()

	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, make([]byte, small), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-d", dev}, {dev, other}} {
		if out, err := exec.Command("losetup", args...).CombinedOutput(); err != nil {
			t.Fatalf("losetup %v: %v: %s", args, err, out)
		}
	}
	s = open(t, bpf.Options{Dir: pins}, dev)
	wantUnknown(t, changes(t, s, id), small, "diskseq changed")
}

func TestUnknownAfterResize(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	back, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(strings.TrimSpace(string(back)), 2*small); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("losetup", "-c", dev).CombinedOutput(); err != nil {
		t.Fatalf("losetup -c: %v: %s", err, out)
	}
	s = open(t, bpf.Options{Dir: pins}, dev)
	wantUnknown(t, changes(t, s, id), 2*small, "resized")
}

func TestUnknownAfterForeignCommit(t *testing.T) {
	dev := loopDevice(t, small, "")
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	d := changes(t, s, id)
	if err := s.Commit(d.ID); err != nil {
		t.Fatal(err)
	}
	wantUnknown(t, changes(t, s, id), small, "given up")
	forged, err := cbt.ParseChangeID(strings.Split(d.ID.String(), ".")[0] + ".999")
	if err != nil {
		t.Fatal(err)
	}
	wantUnknown(t, changes(t, s, forged), small, "tracker is at")
}

func TestDeviceIsHeldByOneProcess(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	open(t, bpf.Options{Dir: pins}, dev)
	tr, err := bpf.Open(bpf.Options{Dir: pins})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tr.Close() }()
	if _, err := cbt.OpenTracked(tr, dev, 16); err == nil || !strings.Contains(err.Error(), bpf.ErrBusy.Error()) {
		t.Errorf("got %v, want %v", err, bpf.ErrBusy)
	}
}

// A bio that was submitted before tracking began does not tell, when it completes,
// where it wrote.
func TestUnknownAfterWriteInFlightAtTheBeginning(t *testing.T) {
	dev := delayDevice(t, small, time.Second)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f, err := os.OpenFile(dev, os.O_RDWR|syscall.O_DIRECT, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = f.Close() }()
		if _, err := f.WriteAt(aligned(4096), 1<<20); err != nil {
			t.Error(err)
		}
	}()
	time.Sleep(300 * time.Millisecond)
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	select {
	case <-done:
		t.Skip("SKIP: the write was over too soon")
	default:
	}
	<-done
	d := changes(t, s, id)
	wantUnknown(t, d, small, "began before tracking did")
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
		t.Errorf("the next epoch is unknown too: %v", d.Unknown)
	}
}
