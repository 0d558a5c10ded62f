package bpf

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

func TestLostEvents(t *testing.T) {
	for _, c := range []struct {
		window, ever []uint64
		whole, want  bool
	}{
		{[]uint64{0, 0, 0}, []uint64{9, 9, 9}, true, false},
		{[]uint64{5, 0, 7}, []uint64{9, 9, 9}, true, false}, // one copy saw all
		{[]uint64{1, 1, 1}, []uint64{1, 1, 1}, true, true},
		{[]uint64{0, 0, 0}, []uint64{9, 9, 9}, false, false},
		{[]uint64{5, 0, 7}, []uint64{9, 0, 9}, false, false}, // one copy has seen all, ever
		{[]uint64{0, 0, 1}, []uint64{1, 1, 1}, false, true},  // the others may have missed the same one before
		{[]uint64{1, 0, 0}, []uint64{1, 1, 1}, false, true},
	} {
		if got := lostEvents(c.window, c.ever, c.whole); got != c.want {
			t.Errorf("%+v: got %v", c, got)
		}
	}
}

// Where tracepoints can be preempted, each call that the first copies missed and a later one saw is counted once, and none else.
// Copies that are taken away miss all.
func TestRescuedCallsAreCounted(t *testing.T) {
	for absent := range copies {
		t.Run(fmt.Sprint(absent), func(t *testing.T) {
			dev := sparseLoop(t, 1<<20).Label()
			var tr *Tracker
			var extra Misses
			tr = openTest(t, Options{Copies: copies, Preemptible: true, Misses: func(m Misses) Misses {
				if tr == nil {
					return m // it is being attached
				}
				m = extra
				for p := range programs {
					m[p*copies] += tr.calls.words[callsBefore+p] + atomic.LoadUint64(&tr.calls.words[2*p+callsRescued]) - atomic.LoadUint64(&tr.calls.words[2*p+callsUnnoted])
				}
				return m
			}})
			const n = 200
			counts := func() (rescued, runs [3]uint64) {
				for p := range programs {
					s, err := tr.progs[p*copies+copies-1].Stats()
					if err != nil {
						t.Fatal(err)
					}
					rescued[p], runs[p] = atomic.LoadUint64(&tr.calls.words[2*p+callsRescued]), s.RunCount
				}
				return rescued, runs
			}
			stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = stats.Close() }()
			write := func() {
				t.Helper()
				if out, err := exec.Command("dd", "if=/dev/zero", "of="+dev, "bs=4k", fmt.Sprint("count=", n), "oflag=direct", "conv=notrunc").CombinedOutput(); err != nil {
					t.Fatalf("dd: %v: %s", err, out)
				}
			}
			write()
			if rescued, runs := counts(); rescued != [3]uint64{} || runs[0] < n || runs[1] < n {
				t.Errorf("all are attached: rescued %v of %v", rescued, runs)
			}
			for i := range tr.links {
				if i%copies < absent {
					if err := errors.Join(os.Remove(tr.pin("link-"+programName(i))), tr.links[i].Close()); err != nil {
						t.Fatal(err)
					}
					tr.links[i] = nil
				}
			}
			_, runsBefore := counts() // runs are counted first at the beginning and last at the end: others write too
			before, _ := counts()
			write()
			after, _ := counts()
			_, runsAfter := counts()
			for p := range 2 { // a loop device has no bio_complete
				got, runs := after[p]-before[p], runsAfter[p]-runsBefore[p]
				if absent == 0 && got != 0 || absent > 0 && (got < n || got > runs) {
					t.Errorf("%s: %d were rescued, %d calls, %d of which at least by this test", programs[p], got, runs, n)
				}
			}
			if got, err := tr.vouched(); err != nil || got != 7 {
				t.Errorf("copy 0 missed what was rescued: %b, %v", got, err)
			}
			extra[copies] = 1
			if got, err := tr.vouched(); err != nil || got != 5 {
				t.Errorf("every copy of the second program missed one: %b, %v", got, err)
			}
		})
	}
}

// What the first copy missed while others were being attached would be missing for ever: then all are attached again.
func TestAttachedAgainUntilItVouches(t *testing.T) {
	var first uint32
	pin := filepath.Join(testDir(t), "gen-1", "link-bio_queue_0")
	tr := openTest(t, Options{Copies: copies, Preemptible: true, Misses: func(m Misses) Misses {
		id, err := pinnedLinkID(pin)
		if err != nil {
			t.Error(err)
		}
		if first == 0 {
			first = id
		}
		if id == first {
			m[0]++
		}
		return m
	}})
	if tr.LinkIDs()[0] == first {
		t.Error("attached once")
	}
	if got, err := tr.vouched(); err != nil || got != 7 {
		t.Errorf("vouched for: %b, %v", got, err)
	}
}
