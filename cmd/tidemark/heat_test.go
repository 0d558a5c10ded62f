package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/bpf"
)

func TestSqueeze(t *testing.T) {
	for _, c := range []struct {
		v    []uint64
		n    int
		want []uint64
	}{
		{[]uint64{1, 2, 3}, 5, []uint64{1, 2, 3}},
		{[]uint64{1, 2, 3, 4, 5}, 2, []uint64{6, 9}},
		{[]uint64{1, 2, 3, 4, 5}, 3, []uint64{3, 7, 5}},
		{nil, 3, nil},
	} {
		if got := squeeze(c.v, c.n); !slices.Equal(got, c.want) {
			t.Errorf("squeeze(%v, %d): %v, want %v", c.v, c.n, got, c.want)
		}
	}
}

func TestShade(t *testing.T) {
	for n, want := range map[uint64]rune{0: ' ', 1 << 20: '@', 1<<20 - 1: '@', 1 << 18: '%', 1<<18 + 1: '@', 1 << 16: '#', 1: '.'} {
		if got := shade(n, 1<<20); got != want {
			t.Errorf("shade(%d): %q, want %q", n, got, want)
		}
	}
}

func TestDrawHeat(t *testing.T) {
	h := deviceHeat{Device: "/dev/x", Size: 1024 << 20, Region: 1 << 20, Heat: make([]uint64, 1024)}
	h.Heat[0], h.Heat[1023] = 100<<20, 1<<10
	var b strings.Builder
	if err := h.draw(&b, 80); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimRight(b.String(), "\n"), "\n")
	if len(lines) != heatRows+2 || !strings.Contains(lines[1], "|@ ") || !strings.HasSuffix(lines[heatRows], ".|") {
		t.Errorf("drawn:\n%s", b.String())
	}
}

// An audit's alarm stands below the picture.
func TestDrawHeatOfAnUnknownDisk(t *testing.T) {
	h := deviceHeat{Device: "./x.raw", Size: 4 << 20, Region: 4096, Heat: make([]uint64, 1024), Unknown: bpf.TaintAudit.Reasons()}
	var b strings.Builder
	if err := h.draw(&b, 80); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "unknown: an audit found a change that was not recorded") {
		t.Errorf("drawn:\n%s", b.String())
	}
}
