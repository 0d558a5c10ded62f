package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

func sectors(n uint64) *uint64 { return &n }

// The first round of a full backup has no epochs and no count; those after it have.
func TestSumEvidence(t *testing.T) {
	sum := sumEvidence([]cbt.Evidence{
		{Method: "ebpf"},
		{FirstEpoch: 2, LastEpoch: 2, Sectors: 8, KernelSectors: sectors(8), LeastMisses: []uint64{0, 1}},
		{FirstEpoch: 3, LastEpoch: 4, Sectors: 16, KernelSectors: sectors(24), LeastMisses: []uint64{0, 2}, Earlier: true},
	})
	if sum.FirstEpoch != 2 || sum.LastEpoch != 4 || sum.Sectors != 24 || sum.KernelSectors == nil || *sum.KernelSectors != 32 || sum.LeastMisses[1] != 3 || !sum.Earlier {
		t.Errorf("%+v", sum)
	}
	sum = sumEvidence([]cbt.Evidence{{FirstEpoch: 2, KernelSectors: sectors(8)}, {FirstEpoch: 3}})
	if sum.KernelSectors != nil {
		t.Error("a round that was not counted counts")
	}
	if sum = sumEvidence(nil); sum.Method != "" {
		t.Errorf("%+v", sum)
	}
}

// What was only taken for granted does not read like a proof.
func TestEvidenceOfASavedState(t *testing.T) {
	ev, err := json.Marshal([]cbt.Evidence{{Method: "ebpf", FirstEpoch: 5, LastEpoch: 6, SavedState: "of boot 1234, taken for untouched since, as told", Earlier: true}})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := diskEvidence(&b, store.Disk{Name: "disk0", Tracking: store.Tracking{Mode: "tracked", Evidence: ev}}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"if nobody else wrote while the host was down", "of boot 1234, taken for untouched since", "other programs marked a part of it"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, &b)
		}
	}
	if strings.Contains(b.String(), "no write was missed") {
		t.Errorf("it claims a proof:\n%s", &b)
	}
}
