package testvm_test

import (
	"reflect"
	"strings"
	"testing"

	testvm "github.com/tidemark/tidemark/test/vm"
)

func parse(text string) testvm.Report {
	texts := strings.Split(text, "\n")
	lines := make([]testvm.Line, 0, len(texts))
	for i, s := range texts {
		lines = append(lines, testvm.Line{N: i, Text: s})
	}
	return testvm.ParseConsole(lines)
}

func TestParseConsoleOfAWriter(t *testing.T) {
	got := parse("[    0.1] Linux\nTIDEMARK-GUEST booted writer\nTIDEMARK-GUEST missing 3\nTIDEMARK-GUEST bad 4\n" +
		"TIDEMARK-GUEST last 5\nTIDEMARK-GUEST wrote 6\n[ 1.2]TIDEMARK-GUEST wrote 7\nTIDEMARK-GUEST full 7\nTIDEMARK-GUEST wrote x\n")
	want := testvm.Report{Booted: true, Mode: "writer", Last: 5, Missing: []int{3}, Bad: []int{4}, Wrote: 7, Full: true}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v", got)
	}
}

func TestLastIsUnknownUntilTold(t *testing.T) {
	if r := parse("TIDEMARK-GUEST booted show"); r.Last != -1 || r.Complete {
		t.Fatalf("got %+v", r)
	}
}

func FuzzParseConsole(f *testing.F) {
	f.Add("TIDEMARK-GUEST booted show\nTIDEMARK-GUEST last 0\nTIDEMARK-GUEST complete 0")
	f.Add("TIDEMARK-GUEST last 99999999999999999999\nTIDEMARK-GUEST wrote -1\nTIDEMARK-GUEST ")
	f.Fuzz(func(t *testing.T, text string) {
		r := parse(text)
		if r.Last < -1 || r.Wrote < 0 || r.Complete && r.Last < 0 {
			t.Fatalf("got %+v", r)
		}
	})
}
