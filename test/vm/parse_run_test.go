package testvm

import (
	"slices"
	"strings"
	"testing"
)

func parseRunText(text string) ([]int, bool) {
	var log []Line
	for s := range strings.SplitSeq(text, "\n") {
		log = append(log, Line{Text: s})
	}
	return parseRun(log, "ABC")
}

func TestParseRun(t *testing.T) {
	for name, c := range map[string]struct {
		log   string
		exits []int
		done  bool
	}{
		"all":            {"TIDEMARK-RUN ABC start 1\nTIDEMARK-RUN ABC exit 1 0\nTIDEMARK-RUN ABC exit 2 1\nTIDEMARK-RUN ABC done 2", []int{0, 1}, true},
		"cut short":      {"TIDEMARK-RUN ABC exit 1 0", []int{0}, false},
		"foreign token":  {"TIDEMARK-RUN XYZ exit 1 0\nTIDEMARK-RUN ABC exit 1 7\nTIDEMARK-RUN XYZ done 1", []int{7}, false},
		"no line end":    {"PASSTIDEMARK-RUN ABC exit 1 2", []int{2}, false},
		"out of order":   {"TIDEMARK-RUN ABC exit 2 0\nTIDEMARK-RUN ABC done 2", nil, false},
		"lines got lost": {"TIDEMARK-RUN ABC exit 1 0\nTIDEMARK-RUN ABC done 2", []int{0}, false},
	} {
		t.Run(name, func(t *testing.T) {
			exits, done := parseRunText(c.log)
			if !slices.Equal(exits, c.exits) || done != c.done {
				t.Fatalf("got %v, %v", exits, done)
			}
		})
	}
}

func FuzzParseRun(f *testing.F) {
	f.Add("TIDEMARK-RUN ABC exit 1 0\nTIDEMARK-RUN ABC done 1")
	f.Add("TIDEMARK-RUN ABC exit 1\nTIDEMARK-RUN ABC done x\nTIDEMARK-RUN ")
	f.Fuzz(func(t *testing.T, text string) {
		if exits, _ := parseRunText(text); len(exits) > strings.Count(text, "exit") {
			t.Fatalf("%d exits out of %q", len(exits), text)
		}
	})
}
