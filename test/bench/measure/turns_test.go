package measure_test

import (
	"testing"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func TestTurnsAlternate(t *testing.T) {
	first := map[int]int{}
	for round := range 6 {
		order := measure.Turns(3, round)
		seen := map[int]bool{}
		for _, k := range order {
			seen[k] = true
		}
		if len(seen) != 3 {
			t.Fatalf("round %d: %v", round, order)
		}
		first[order[0]]++
	}
	if first[0] != 2 || first[1] != 2 || first[2] != 2 {
		t.Fatalf("first in a round: %v", first)
	}
	if a, b := measure.Turns(2, 0), measure.Turns(2, 1); a[0] == b[0] {
		t.Fatalf("%v, %v", a, b)
	}
}
