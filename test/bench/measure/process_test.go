package measure_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/test/bench/measure"
)

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
	d, err := measure.Process{Path: "cat", Stdin: f}.Run(t.Context())
	if err != nil || len(d.Out) != 12345 || d.Wall <= 0 {
		t.Fatalf("got %d bytes, %v", len(d.Out), err)
	}
	if at, err := f.Seek(0, 1); err != nil || at != 12345 {
		t.Fatalf("at %d, %v", at, err)
	}
	if _, err := (measure.Process{Path: "sh", Args: []string{"-c", "echo why >&2; exit 3"}}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "why") {
		t.Fatalf("got %v", err)
	}
}
