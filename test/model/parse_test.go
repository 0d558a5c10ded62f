package main

import "testing"

const complete = `
Full statespace search for:
	never claim         	- (none specified)
State-vector 100 byte, depth reached 136, errors: 0
  2660396 states, stored
`

// A search that did not visit all proves nothing.
func TestSearchCutShortIsNotComplete(t *testing.T) {
	r, err := parseSearch(complete)
	if err != nil || !r.complete || r.failed || r.states != 2660396 || r.depth != 136 {
		t.Errorf("got %+v, %v", r, err)
	}
	for _, why := range []string{
		"error: max search depth too small", "pan: reached -DMEMLIM bound", "Warning: Search not completed",
	} {
		if r, err := parseSearch(why + complete); err != nil || r.complete {
			t.Errorf("%s: got %+v, %v", why, r, err)
		}
	}
	if _, err := parseSearch("Segmentation fault"); err == nil {
		t.Error("nonsense was read as a search")
	}
}

func TestTraceNamesTheProperty(t *testing.T) {
	steps, violated := parseTrace("  writer 0|submits a write\nP1|violated: it is lost\nspin: epoch.pml:190, Error: assertion violated\n")
	if len(steps) != 2 || steps[0] != (step{"writer 0", "submits a write"}) || violated != "P1" {
		t.Errorf("got %v, %q", steps, violated)
	}
}
