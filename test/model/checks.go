package main

import "slices"

// protocol is a model and what is asked of it.
type protocol struct {
	name       string
	file       string
	begins     string // how every trace does
	properties []property
	checks     []check
}

var protocols = []protocol{
	{"Epochs", "epoch.pml", "Every trace begins with a durable point that equals the\ndisk, with change ID 0, and epoch 1 as the current one.", properties, checks},
	{"Garbage collection", "gc.pml", "Records, packs, points, sessions and\ndocuments are numbered; sets of them are sums of powers of two. Pack 0 holds records 0 and 1 (of one record: 0), point 0 refers to record 0;\nwith a tree, point 0 refers to nodes 0 and 1, point 1 to node 1, and nodes 0 and 1 to records 2 and 3.", gcProperties, gcChecks},
}

// property is what a model asserts.
type property struct{ name, says string }

var properties = []property{
	{"P1", "no write is forgotten: whatever completed before a point's last swap is in the point; what a point lacks is marked\n      in an epoch of the next delta, or that delta is unknown"},
	{"P2", "an epoch that is read is final"},
	{"P3", "P1 and P2 hold when a process is killed before any step that outlives it, and the next adopts what is left"},
	{"P4", "a point that shows an instant holds all that completed before the instant that it names, and nothing submitted after"},
	{"P5", "no needless compare: a delta is unknown only after a lost event, a foreign commit or at the beginning"},
}

// check is one search.
type check struct {
	name   string
	macros []string
	expect string // the property that must be violated; empty if all must hold
}

// properties that the check asserts: instants cost states, so not every check looks at them.
func (p protocol) asserted(c check) []string {
	if len(p.properties) == 1 {
		return []string{p.properties[0].name}
	}
	out := []string{"P1", "P2"}
	if !slices.Contains(c.macros, "KILLS=0") {
		out = append(out, "P3")
	}
	if slices.Contains(c.macros, "INSTANTS") {
		out = append(out, "P4")
	}
	if !slices.Contains(c.macros, "ANY_COMPARE") && !slices.Contains(c.macros, "BEGINNING") {
		out = append(out, "P5")
	}
	return out
}

// The bounds are chosen so that all searches together take less than three minutes on
// two processors. docs/protocol.md says what they mean.
var checks = []check{
	{"writes, swaps, a kill", []string{"WRITES=3", "SWAPS=3", "KILLS=1"}, ""},
	{"two kills, merged epochs", []string{"WRITES=2", "SWAPS=4", "KILLS=2", "RETAINED=1"}, ""},
	{"backups to two repositories", []string{"WRITES=2", "SWAPS=3", "KILLS=1", "FOREIGN=1", "RETAINED=1"}, ""},
	{"lost events, a kill", []string{"WRITES=1", "SWAPS=3", "KILLS=1", "COPIES=3", "MISSES=3"}, ""},
	{"lost events, one copy, a kill", []string{"WRITES=1", "SWAPS=3", "KILLS=1", "COPIES=1", "MISSES=2"}, ""},
	{"lost events, two writers", []string{"WRITES=2", "SWAPS=2", "KILLS=0", "COPIES=2", "MISSES=2"}, ""},
	{"lost events on a device that completes bios", []string{"WRITES=1", "SWAPS=3", "KILLS=0", "COPIES=3", "MISSES=4", "BIO"}, ""},
	{"a write in flight when tracking begins", []string{"WRITES=2", "SWAPS=3", "KILLS=1", "BEGINNING"}, ""},
	{"the same on a device that completes bios", []string{"WRITES=2", "SWAPS=3", "KILLS=1", "BEGINNING", "BIO"}, ""},
	{"instants, more writes", []string{"WRITES=3", "SWAPS=3", "KILLS=0", "INSTANTS"}, ""},
	{"instants, lost events", []string{"WRITES=2", "SWAPS=2", "KILLS=0", "COPIES=1", "MISSES=2", "INSTANTS"}, ""},
	{"instants on a device that completes bios", []string{"WRITES=2", "SWAPS=3", "KILLS=0", "INSTANTS", "BIO", "BEGINNING"}, ""},
	{"instants, pauses that fail", []string{"WRITES=2", "SWAPS=4", "KILLS=0", "INSTANTS"}, ""},

	// What is not needed for P1, though it is for another property: said here so that
	// nobody believes more than is so.
	{"no mark at submission: no write is forgotten all the same", []string{"WRITES=3", "SWAPS=3", "KILLS=1", "NO_SUBMISSION_MARK"}, ""},
	{"released before the point is durable: a gap in the epochs' numbers shows it", []string{"WRITES=2", "SWAPS=3", "KILLS=1", "RELEASE_BEFORE_COMMIT", "ANY_COMPARE"}, ""},
	{"a closed epoch is forgotten: a gap shows that too", []string{"WRITES=2", "SWAPS=3", "KILLS=1", "ADOPT_DROPS_CLOSED", "ANY_COMPARE"}, ""},

	{"no mark at completion", []string{"WRITES=1", "SWAPS=2", "KILLS=0", "NO_COMPLETION_MARK"}, "P1"},
	{"no mark at submission", []string{"WRITES=2", "SWAPS=3", "KILLS=0", "INSTANTS", "NO_SUBMISSION_MARK"}, "P4"},
	{"the swap does not wait for a grace period", []string{"WRITES=1", "SWAPS=2", "KILLS=0", "NO_GRACE"}, "P2"},
	{"another process may adopt while the grace period lasts", []string{"WRITES=1", "SWAPS=2", "KILLS=1", "LOCK_ENDS_EARLY"}, "P2"},
	{"the grace period waits for each program, not for all copies at an event", []string{"WRITES=1", "SWAPS=2", "KILLS=0", "COPIES=2", "MISSES=2", "GRACE_PER_PROGRAM"}, "P1"},
	{"one copy, and its misses are not looked at", []string{"WRITES=1", "SWAPS=2", "KILLS=0", "COPIES=1", "MISSES=1", "ONE_COPY"}, "P1"},
	{"misses are counted from after the swap that begins the epoch", []string{"WRITES=1", "SWAPS=2", "KILLS=0", "MISSES=1", "MISSES_SAMPLED_LATE"}, "P1"},
	{"epochs are released before the point is durable", []string{"WRITES=1", "SWAPS=2", "KILLS=1", "RELEASE_BEFORE_COMMIT"}, "P5"},
	{"the same, and gaps between epochs are not looked for", []string{"WRITES=1", "SWAPS=2", "KILLS=1", "RELEASE_BEFORE_COMMIT", "NO_GAP_CHECK"}, "P1"},
	{"an adopting process forgets closed epochs", []string{"WRITES=1", "SWAPS=2", "KILLS=1", "ADOPT_DROPS_CLOSED"}, "P5"},
	{"the same, and gaps between epochs are not looked for", []string{"WRITES=1", "SWAPS=2", "KILLS=1", "ADOPT_DROPS_CLOSED", "NO_GAP_CHECK"}, "P1"},
	{"a foreign commit, and gaps between epochs are not looked for", []string{"WRITES=1", "SWAPS=2", "KILLS=0", "FOREIGN=1", "NO_GAP_CHECK"}, "P1"},
	{"an instant is looked for before all is read", []string{"WRITES=2", "SWAPS=2", "KILLS=0", "INSTANTS", "LOOK_BEFORE_READ"}, "P4"},
	{"an instant is looked for in the bitmap alone", []string{"WRITES=1", "SWAPS=2", "KILLS=0", "COPIES=1", "MISSES=1", "INSTANTS", "LOOK_PAST_MISSES"}, "P4"},
	{"an instant is named by the swap before a pause that failed", []string{"WRITES=2", "SWAPS=4", "KILLS=0", "RETAINED=4", "INSTANTS", "INSTANT_BEFORE_PAUSE"}, "P4"},
}
