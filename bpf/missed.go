package bpf

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// wholeCalls tells whether this kernel lets nobody else run on a processor while a tracepoint calls
// its programs. From 7.0 on SRCU guards tracepoints (commit a46023d5616e, "tracing: Guard
// __DECLARE_TRACE() use of __DO_TRACE_CALL() with SRCU-fast"), and they can be preempted.
func wholeCalls() bool { return kernelBefore(7, 0) }

func (t *Tracker) wholeCalls() bool { return wholeCalls() && !t.options.Preemptible }

// lostEvents tells whether every copy of a program may have missed the same event, which with one
// copy is any. window are the copies' misses while an epoch was open, ever those since they were attached.
//
// Where calls are whole, the grace period of a swap waits for the call of all copies, and an event
// lies in one window. Else a call may be stopped between two copies for any time: what another copy
// missed in any epoch before may have been the same event. The epoch in which its last copy
// missed it is the one that is blamed: until then the write was in flight.
// test/model has the variant GRACE_PER_PROGRAM.
func lostEvents(window, ever []uint64, whole bool) bool {
	if whole {
		return slices.Min(window) > 0
	}
	return slices.Max(window) > 0 && slices.Min(ever) > 0
}

// vouchedPatience is how long calls are waited for that are just between two copies.
const vouchedPatience = 50 * time.Millisecond

// vouched tells, a bit for each program, that no event was missed by all copies since they were attached, where calls
// are not whole. See note() in tracker.bpf.c: what copy 0 missed and no later one has seen is 0. A call that is between two copies
// counts as missed until one has seen it. What was rescued is read first, so that it is never more
// than what goes with it in the kernel's count.
func (t *Tracker) vouched() (uint64, error) {
	if t.wholeCalls() {
		return 0, nil
	}
	for begin := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		var rescued [9 / copies]uint64
		for p := range rescued {
			rescued[p] = atomic.LoadUint64(&t.calls.words[2*p+callsRescued])
		}
		missed, err := t.Misses()
		if err != nil {
			return 0, err
		}
		var all, bits uint64
		for p, n := range rescued {
			all |= 1 << p
			if missed[p*copies]-t.calls.words[callsBefore+p]+atomic.LoadUint64(&t.calls.words[2*p+callsUnnoted]) == n {
				bits |= 1 << p
			}
		}
		if bits == all || time.Since(begin) > vouchedPatience {
			return bits, nil
		}
	}
}

// countBefore writes down what copy 0 of program p has missed while it is the only one: no other was there to rescue
// that, and no device either.
func (t *Tracker) countBefore(p int) error {
	s, err := t.progs[p*copies].Stats()
	if err != nil {
		return fmt.Errorf("statistics of %s: %w", programName(p*copies), err)
	}
	return t.maps.CallCounts.Put(uint32(callsBefore+p), s.RecursionMisses)
}

// leastMissed is, per program, how many events every copy may have missed: none where the programs vouch for
// that, else what the copy that missed least has.
func leastMissed(missed []uint64, vouched uint64) []uint64 {
	out := make([]uint64, len(missed)/copies)
	for p := range out {
		if vouched>>p&1 == 0 {
			out[p] = slices.Min(missed[p*copies : (p+1)*copies])
		}
	}
	return out
}

// strayLanding tells whether a write on a bio-based device may have been marked where another one
// lay, by what the copies have ever missed: if the last of them missed a completion, its entry is
// still in the table of writes in flight; and if then all of them missed the submission of a bio at the same
// address, that one completes with the old entry, in whichever epoch. It lasts until other programs take
// over, with a table of their own.
func strayLanding(ever []uint64, attached int, vouched uint64) bool {
	if vouched>>slices.Index(programs, "bio_queue")&1 != 0 {
		return false
	}
	submissions, completions := slices.Index(programs, "bio_queue")*copies, slices.Index(programs, "bio_complete")*copies
	return ever[completions+attached-1] > 0 && slices.Min(ever[submissions:submissions+attached]) > 0
}
