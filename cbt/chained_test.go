package cbt_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// discarding runs blkdiscard; over is closed when it has ended.
func discarding(t *testing.T, args ...string) (pid int, over <-chan struct{}) {
	t.Helper()
	c := exec.CommandContext(t.Context(), "blkdiscard", args...)
	var out strings.Builder
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.Wait(); err != nil && t.Context().Err() == nil {
			t.Errorf("blkdiscard %v: %v: %s", args, err, &out)
		}
	}()
	t.Cleanup(func() { <-done })
	return c.Process.Pid, done
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for begin := time.Now(); time.Since(begin) < time.Minute; time.Sleep(20 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatal(what, ": not in a minute")
}

// delayed are the writes that each target of a table of delays holds back.
func delayed(t *testing.T, dev string) (n []int) {
	t.Helper()
	out, err := exec.Command("dmsetup", "status", dev).CombinedOutput()
	if err != nil {
		t.Fatalf("dmsetup status: %v: %s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		var begin, sectors, reads, writes int
		if _, err := fmt.Sscanf(line, "%d %d delay %d %d", &begin, &sectors, &reads, &writes); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		n = append(n, writes)
	}
	return n
}

// register begins tracking with a tracker that was attached before.
func register(t *testing.T, tr *bpf.Tracker, dev string) (*cbt.Tracked, cbt.ChangeID) {
	t.Helper()
	s, err := cbt.OpenTracked(tr, dev, bpf.DefaultGranuleShift)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s, changes(t, s, cbt.ChangeID{}).ID
}

func attach(t *testing.T) *bpf.Tracker {
	t.Helper()
	tr, err := bpf.Open(bpf.Options{Dir: pinDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tr.Close() })
	return tr
}

// A bio that is chained to another was submitted before tracking began, as the other was: that it is chained
// does not make it a part (__blkdev_issue_zero_pages). It completes alone, in an epoch in which nothing else does.
func TestUnknownAfterChainedWriteInFlightAtTheBeginning(t *testing.T) {
	dmTargets(t, "delay")
	const sooner, later = 4 * time.Second, 10 * time.Second
	below := loopDevice(t, small, "")
	dev := mapped(t, below, "chained", "0 2048 delay %[1]s 0 0 %[1]s 0 %[2]d\n2048 %[4]d delay %[1]s 2048 0 %[1]s 2048 %[3]d",
		below, sooner.Milliseconds(), later.Milliseconds(), small/512-2048)
	tr := attach(t)
	// A device that can't be told to write zeroes gets them in bios of 1 MiB, each chained to the next.
	_, over := discarding(t, "-z", "-l", "3M", dev)
	eventually(t, "three writes in flight", func() bool { return slices.Equal(delayed(t, dev), []int{1, 2}) })
	s, id := register(t, tr, dev)
	if n := delayed(t, dev); n[0] != 1 {
		t.Skip("SKIP: the first write was over too soon")
	}
	eventually(t, "the first write is over", func() bool { return delayed(t, dev)[0] == 0 })
	time.Sleep(500 * time.Millisecond)
	d := changes(t, s, id)
	if n := delayed(t, dev); n[1] != 2 {
		t.Skip("SKIP: the others were over too soon")
	}
	wantUnknown(t, d, small, "began before tracking did")
	<-over
	d = changes(t, s, d.ID)
	wantUnknown(t, d, small, "began before tracking did")
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
		t.Errorf("all were over: %v", d.Unknown)
	}
}

// A bio was submitted before tracking began, and the one that it is chained to after: that one's range is
// known, and does not hold the first one (__blkdev_issue_discard).
func TestUnknownAfterChainedWriteBeforeOneThatWasSeen(t *testing.T) {
	dev := mdDevice(t, "1", 2, 2*small)
	size, err := deviceSize(dev)
	if err != nil {
		t.Fatal(err)
	}
	// md holds a writer to these sectors up while it submits.
	hold := func(lo, hi int) {
		t.Helper()
		for name, n := range map[string]int{"suspend_lo": lo, "suspend_hi": hi} {
			if err := os.WriteFile(filepath.Join("/sys/block", filepath.Base(dev), "md", name), fmt.Append(nil, n), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	tr := attach(t)
	hold(0, 8)
	// A bio up to where a granule of discards begins, chained to one of the rest. (Zeroes would be split: that
	// such a part has no whole is another reason.)
	pid, over := discarding(t, "-o", "512", "-l", "1M", dev)
	t.Cleanup(func() { hold(0, 0) }) // before the writer is waited for
	held := 0
	eventually(t, "the writer is held up for a second", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if _, after, ok := strings.Cut(string(b), ") "); err != nil || !ok || after[0] != 'D' {
			held = 0
		}
		held++
		return held > 50
	})
	s, id := register(t, tr, dev)
	hold(0, 0)
	<-over
	d := changes(t, s, id)
	wantUnknown(t, d, size, "began before tracking did")
	if d.Evidence.Sectors != 2041 {
		t.Errorf("%d sectors were seen when they were submitted, want 2041: those of the second bio alone", d.Evidence.Sectors)
	}
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
		t.Errorf("all were over: %v", d.Unknown)
	}
}
