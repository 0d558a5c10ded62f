package cbt

import (
	"slices"
	"testing"
)

func TestMissesOfOtherPrograms(t *testing.T) {
	e := Evidence{Programs: []string{"a", "b"}}
	for _, least := range [][]uint64{{1, 2}, {1}, nil, {0, 1, 7}} {
		e.addMisses(least)
	}
	if want := []uint64{2, 3}; !slices.Equal(e.LeastMisses, want) {
		t.Errorf("%v, want %v", e.LeastMisses, want)
	}
}
