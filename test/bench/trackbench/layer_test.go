package main

import "testing"

func TestParseSnapshotStatus(t *testing.T) {
	if n, err := parseSnapshotStatus("0 524288 snapshot 1040/557056 16\n"); err != nil || n != 1040 {
		t.Errorf("got %d, %v", n, err)
	}
	for _, bad := range []string{"", "0 524288 snapshot Invalid", "0 524288 snapshot Overflow", "0 524288 linear 1/2"} {
		if _, err := parseSnapshotStatus(bad); err == nil {
			t.Errorf("%q was taken for a working snapshot", bad)
		}
	}
}

func TestChooseLayers(t *testing.T) {
	got, err := chooseLayers("none,tracked")
	if err != nil || len(got) != 2 || got[1].name != "tracked" {
		t.Fatalf("got %v, %v", got, err)
	}
	for _, bad := range []string{"", "tracked", "none,era,x"} {
		if _, err := chooseLayers(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
