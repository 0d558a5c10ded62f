package bpf

import "testing"

func TestParseStat(t *testing.T) {
	for s, want := range map[string]uint64{
		"    1 0 8 0 5 0 4096 3 0 4 4 2 0 512 0 1 0\n": 4608,
		"1 0 8 0 5 0 4096 3 0 4 4":                     4096, // before 4.18
	} {
		if got, err := parseStat(s); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "1 2 3", "1 2 3 4 5 6 x", "1 0 8 0 5 0 4096 3 0 4 4 2 0 x 0 1 0"} {
		if n, err := parseStat(s); err == nil {
			t.Errorf("%q: got %d, want an error", s, n)
		}
	}
}

func TestUncounted(t *testing.T) {
	for _, c := range []struct {
		kernel, submitted, completed uint64
		want                         bool
	}{
		{0, 0, 0, false},
		{1 << 20, 1 << 20, 0, false}, // counted when they begin
		{1 << 20, 0, 1 << 20, false},
		{1<<20 + countingSlack, 1 << 20, 1 << 20, false},
		{1<<20 + 2*countingSlack + 1, 1 << 20, 1 << 20, true},
		{1 << 20, 0, 0, true},
	} {
		if got := uncounted(c.kernel, c.submitted, c.completed, 2); got != c.want {
			t.Errorf("%+v: got %v", c, got)
		}
	}
}
