package measure_test

import (
	"slices"
	"testing"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func TestChooseFiles(t *testing.T) {
	all := func() []measure.File {
		return []measure.File{{"a", 100 << 10}, {"b", 1}, {"c", 3 << 20}, {"d", 8192}, {"e", 50 << 10}}
	}
	const budget = 200 << 10
	got := measure.ChooseFiles(all(), budget, 1)
	var used int64
	for _, s := range got {
		used += s.Size
		if s.Path == "c" {
			t.Error("what is larger than all was taken")
		}
	}
	if used > budget || len(got) != 4 {
		t.Fatalf("took %v", got)
	}
	if !slices.Equal(got, measure.ChooseFiles(all(), budget, 1)) {
		t.Error("the same seed chose something else")
	}
	// Nothing takes more inodes than there are.
	tiny := make([]measure.File, 1000)
	if n := len(measure.ChooseFiles(tiny, 1<<20, 1)); n != 64 {
		t.Errorf("took %d empty files", n)
	}
}
