package main

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func TestParsePoint(t *testing.T) {
	const point = `{"point":{"disks":[{"tracking":{"mode":"compare","reasons":["not tracked before"]},"stats":{"read":4096}}]}}`
	if n, err := parsePoint([]byte(point), "compare"); err != nil || n != 4096 {
		t.Errorf("got %d, %v", n, err)
	}
	// A compare must never pass for a tracked incremental.
	if _, err := parsePoint([]byte(point), "tracked"); err == nil || !strings.Contains(err.Error(), "not tracked before") {
		t.Errorf("got %v", err)
	}
	for _, bad := range []string{"", "{}", `{"point":{"disks":[]}}`} {
		if _, err := parsePoint([]byte(bad), "tracked"); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestParseBorg(t *testing.T) {
	if n, err := parseBorg([]byte(`{"archive":{"stats":{"original_size":77}}}`)); err != nil || n != 77 {
		t.Errorf("got %d, %v", n, err)
	}
	for _, bad := range []string{"", "{}"} {
		if _, err := parseBorg([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestOnlyOurOwnWrongPointsEndTheRun(t *testing.T) {
	wrong := func(context.Context) error { return measure.ErrDiffers }
	if err := (&tool{verify: wrong, verifyEach: true}).check(t.Context()); !errors.Is(err, measure.ErrDiffers) {
		t.Errorf("got %v", err)
	}
	peer := &tool{Name: "restic", verify: wrong}
	if err := peer.check(t.Context()); err != nil || peer.Problem == "" || peer.Verified != 0 {
		t.Errorf("got %v, %+v", err, peer)
	}
	var out strings.Builder
	if err := (&bench{tools: []*tool{peer}}).report(&out, false); err != nil || !strings.Contains(out.String(), "WARNING: restic") {
		t.Errorf("%v: %s", err, out.String())
	}
}

func TestReportInBothForms(t *testing.T) {
	ratio := measure.Interval{Value: 40, Low: 30, High: 50}
	b := &bench{rounds: 1, tools: []*tool{
		{Name: "tracked", Seconds: measure.Sample{0.25}, Verified: 2},
		{Name: "restic", Seconds: measure.Sample{10}, Ratio: &ratio},
	}}
	var out strings.Builder
	if err := b.report(&out, false); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "40.0 [30.0, 50.0]") || !strings.Contains(out.String(), "0.250") {
		t.Error(out.String())
	}
	out.Reset()
	if err := b.report(&out, true); err != nil {
		t.Fatal(err)
	}
	if !json.Valid([]byte(out.String())) || !strings.Contains(out.String(), `"restic"`) {
		t.Error(out.String())
	}
}
