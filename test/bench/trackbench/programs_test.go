package main

import (
	"testing"
	"time"
)

func TestPerWrite(t *testing.T) {
	before := []stat{{"a", 10, time.Microsecond}, {"b", 5, 0}}
	after := []stat{{"a", 210, 31 * time.Microsecond}, {"b", 5, 0}}
	got := perWrite(before, after, 100)
	if len(got) != 2 || got[0] != (program{"a", 150, 2}) || got[1] != (program{Name: "b"}) {
		t.Fatalf("got %+v", got)
	}
}

func TestIsTracking(t *testing.T) {
	for name, want := range map[string]bool{"bio_queue_0": true, "bio_complete_2": true, "": false, "sched_switch": false, "rq_issue": false, "rq_issuer_0": false} {
		if isTracking(name) != want {
			t.Errorf("%q: got %v", name, !want)
		}
	}
}
