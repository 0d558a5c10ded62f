package bpf

import "testing"

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
