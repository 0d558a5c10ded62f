package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func TestProgramLines(t *testing.T) {
	lines, total := programLines([][]program{
		{{"bio_queue_0", 100, 1}, {"bio_queue_1", 50, 1}, {"rq_complete_0", 30, 2}},
		{{"bio_queue_0", 120, 1}, {"bio_queue_1", 50, 1}, {"rq_complete_0", 30, 2}},
		{{"bio_queue_0", 900, 1}, {"bio_queue_1", 50, 1}, {"rq_complete_0", 30, 2}},
	})
	if total != 120+50+60 || len(lines) != 2 || lines[0] != "bio_queue\t120 (1.00)\t50 (1.00)" || lines[1] != "rq_complete\t30 (2.00)" {
		t.Fatalf("got %q, %v", lines, total)
	}
}

func TestReportInBothForms(t *testing.T) {
	b := &bench{rounds: 1, layers: layers, notes: []string{"something"}}
	ratio := measure.Interval{Value: 0.9, Low: 0.8, High: 1}
	c := &cell{Device: "loop", Bytes: 1 << 20, Load: load{1, "psync"}, Layers: []*result{
		{Layer: "none", IOPS: measure.Sample{2000}},
		{Layer: "tracked", IOPS: measure.Sample{1800}, IOPSRatio: &ratio, MachineRatio: &ratio},
		{Layer: "era", Refused: "not there"},
	}}
	var out strings.Builder
	if err := b.report(&out, []*cell{c}, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NOTE: something", "0.900 [0.800, 1.000]", "not measured: not there", "depth 1 (psync)"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	out.Reset()
	if err := b.report(&out, []*cell{c}, true); err != nil {
		t.Fatal(err)
	}
	if !json.Valid([]byte(out.String())) || !strings.Contains(out.String(), `"iops_ratio"`) {
		t.Error(out.String())
	}
}
