package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
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

func TestProcessSharesItsPlaceInTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "in")
	if err := os.WriteFile(path, make([]byte, 12345), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	d, err := process{path: "cat", stdin: f}.run(t.Context())
	if err != nil || len(d.out) != 12345 || d.wall <= 0 {
		t.Fatalf("got %d bytes, %v", len(d.out), err)
	}
	if at, err := f.Seek(0, 1); err != nil || at != 12345 {
		t.Fatalf("at %d, %v", at, err)
	}
	if _, err := (process{path: "sh", args: []string{"-c", "echo why >&2; exit 3"}}).run(t.Context()); err == nil || !strings.Contains(err.Error(), "why") {
		t.Fatalf("got %v", err)
	}
}

func TestOnlyOurOwnWrongPointsEndTheRun(t *testing.T) {
	wrong := func(context.Context) error { return errDiffers }
	if err := (&tool{verify: wrong, verifyEach: true}).check(t.Context()); !errors.Is(err, errDiffers) {
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
