package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func testBench() *bench {
	own := &tool{Name: "tidemark", Stored: 110, Backup: costs{Seconds: measure.Sample{2}}, Restore: costs{Seconds: measure.Sample{3}}, Reads: reads{PerSecond: measure.Sample{4000}}}
	peer := &tool{
		Name: "borg", Stored: 100, Backup: costs{Seconds: measure.Sample{8}, Ratio: ratio(measure.Sample{2}, measure.Sample{8})},
		Restore: costs{Seconds: measure.Sample{6}}, Reads: reads{PerSecond: measure.Sample{100}, Ratio: ratio(measure.Sample{4000}, measure.Sample{100})},
	}
	return &bench{rounds: 1, tools: []*tool{own, peer}, copied: measure.Sample{1}}
}

func TestReportSaysBothSidesAndRatios(t *testing.T) {
	var out strings.Builder
	b := testBench()
	b.tools[1].Problem = "borg: wrong"
	if err := b.report(&out, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"0.25 ×", "1.100 ×", "40.00 ×", "3.00 ×", "WARNING: borg: wrong"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	out.Reset()
	if err := b.report(&out, true); err != nil || !json.Valid([]byte(out.String())) {
		t.Errorf("%v: %s", err, out.String())
	}
}

func TestWrongReadsAreSeen(t *testing.T) {
	b := testBench()
	b.image = filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(b.image, bytes.Repeat([]byte{1}, 2*block), 0o600); err != nil {
		t.Fatal(err)
	}
	good, bad := bytes.Repeat([]byte{1}, block), make([]byte, block)
	if err := b.right(map[int64][]byte{0: good, block: good}); err != nil {
		t.Error(err)
	}
	err := b.right(map[int64][]byte{0: good, block: bad})
	if !errors.Is(err, measure.ErrDiffers) {
		t.Fatalf("got %v", err)
	}
	// Ours end the run, a peer's are told.
	if b.tools[0].problem(t.Context(), err) == nil || b.tools[1].problem(t.Context(), err) != nil || b.tools[1].Problem == "" {
		t.Error("a wrong read was not dealt with")
	}
}

func TestImageIsFullOfFiles(t *testing.T) {
	from := t.TempDir()
	for _, name := range []string{"a", "sub/b"} {
		path := filepath.Join(from, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, bytes.Repeat([]byte(name), 12<<20), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	b := &bench{dir: t.TempDir(), size: 128 << 20, from: []string{from}}
	if err := b.makeImage(t.Context()); err == nil {
		// mkfs.ext4 may be missing: then the error says so.
		if n, err := measure.SizeOf(b.dir); err != nil || n != 128<<20 {
			t.Errorf("%d bytes, %v", n, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) && !strings.Contains(err.Error(), "executable file not found") {
		t.Fatal(err)
	}
	b = &bench{dir: t.TempDir(), size: 1 << 30, from: []string{from}}
	if err := b.makeImage(t.Context()); err == nil {
		t.Error("a nearly empty disk was taken")
	}
}
