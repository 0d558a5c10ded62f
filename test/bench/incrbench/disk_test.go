package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestFillCopiesAndSaysWhenThereIsTooLittle(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	want := bytes.Repeat([]byte("x"), 40<<10)
	for _, name := range []string{"a", "sub/b"} {
		path := filepath.Join(from, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("a", filepath.Join(from, "link")); err != nil {
		t.Fatal(err)
	}
	n, size, err := fill(t.Context(), to, from, 100<<10, 1)
	if err != nil || n != 2 || size != 80<<10 {
		t.Fatalf("got %d files, %d bytes, %v", n, size, err)
	}
	if got, err := os.ReadFile(filepath.Join(to, "sub/b")); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("sub/b: %d bytes, %v", len(got), err)
	}
	if _, _, err := fill(t.Context(), t.TempDir(), from, 1<<20, 1); err == nil {
		t.Error("a nearly empty disk was taken")
	}
}

func TestChanges(t *testing.T) {
	const size = 64 << 20
	one, two := changes(size, 1, 7, 1), changes(size, 1, 7, 2)
	if len(one) != 10 || slices.Equal(one, two) || !slices.Equal(one, changes(size, 1, 7, 1)) {
		t.Fatalf("got %v and %v", one, two)
	}
	if len(slices.Compact(slices.Clone(one))) != len(one) || one[0]%granule != 0 || one[9] >= size {
		t.Fatalf("got %v", one)
	}
	if n := len(changes(size, 0.0001, 7, 1)); n != 1 {
		t.Errorf("%d granules", n)
	}
}
