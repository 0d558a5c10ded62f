package bpf

import (
	"fmt"

	"github.com/cilium/ebpf"
)

// Counts are the events of one device since it was registered, as the first copies of the
// programs saw them.
type Counts struct {
	Submits, SubmitSectors       uint64 // write bios, 512-byte sectors
	Completions, CompleteSectors uint64
	Discards, DiscardSectors     uint64 // and write-zeroes
	Rewrites, RewriteSectors     uint64 // whose granules had all been written in the same epoch
	Passthrough                  uint64
}

// Events changes whenever a program ran for the device or was dropped on this
// host: as long as it stays the same, nobody wrote.
func (r *Registration) Events() (uint64, error) {
	// Without its pins, a program for image files is detached, and counts nothing.
	if h, ok := r.programs.(*fileHooks); ok && !h.intact() {
		return 0, ErrDetached
	}
	missed, err := r.programs.missed()
	if err != nil {
		return 0, err
	}
	var n uint64
	for _, m := range missed {
		n += m
	}
	c, err := r.t.counts(r.slot)
	return n + c.Submits + c.Completions + c.Passthrough, err
}

// countedAll tells whether the first copies of the programs that count missed nothing.
func countedAll(missed []uint64) bool {
	for p := range programs {
		if missed[p*copies] != 0 {
			return false
		}
	}
	return true
}

// resetCounts makes a slot's counters and heat begin at 0 for its new device.
func (t *Tracker) resetCounts(slot uint32) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count processors: %w", err)
	}
	if err := t.maps.Counts.Put(slot, make([]trackerCounters, cpus)); err != nil {
		return fmt.Errorf("reset counters: %w", err)
	}
	clear(t.heatWords(slot))
	return nil
}

// counts adds up what was counted on all processors.
func (t *Tracker) counts(slot uint32) (Counts, error) {
	var sum Counts
	var perCPU []trackerCounters
	if err := t.maps.Counts.Lookup(slot, &perCPU); err != nil {
		return sum, fmt.Errorf("counters: %w", err)
	}
	for _, v := range perCPU {
		sum.Submits += v.Submits
		sum.SubmitSectors += v.SubmitSectors
		sum.Completions += v.Completions
		sum.CompleteSectors += v.CompleteSectors
		sum.Discards += v.Discards
		sum.DiscardSectors += v.DiscardSectors
		sum.Rewrites += v.Rewrites
		sum.RewriteSectors += v.RewriteSectors
		sum.Passthrough += v.Passthrough
	}
	return sum, nil
}
