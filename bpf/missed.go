package bpf

import "slices"

// wholeCalls tells whether this kernel lets nobody else run on a processor while a tracepoint calls
// its programs. From 7.0 on SRCU guards tracepoints (commit a46023d5616e, "tracing: Guard
// __DECLARE_TRACE() use of __DO_TRACE_CALL() with SRCU-fast"), and they can be preempted.
func wholeCalls() bool { return kernelBefore(7, 0) }

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

// strayLanding tells whether a write on a bio-based device may have been marked where another one
// lay, by what the copies have ever missed: if the last of them missed a completion, its entry is
// still in the table of writes in flight; and if then all of them missed the submission of a bio at the same
// address, that one completes with the old entry, in whichever epoch. It lasts until other programs take
// over, with a table of their own.
func strayLanding(ever []uint64, attached int) bool {
	submissions, completions := slices.Index(programs, "bio_queue")*copies, slices.Index(programs, "bio_complete")*copies
	return ever[completions+attached-1] > 0 && slices.Min(ever[submissions:submissions+attached]) > 0
}
