package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/iotest"
)

func TestChoose(t *testing.T) {
	all := func() []source {
		return []source{{"a", 100 << 10}, {"b", 1}, {"c", 3 << 20}, {"d", 8192}, {"e", 50 << 10}}
	}
	const budget = 200 << 10
	got := choose(all(), budget, 1)
	var used int64
	for _, s := range got {
		used += s.size
		if s.path == "c" {
			t.Error("what is larger than all was taken")
		}
	}
	if used > budget || len(got) != 4 {
		t.Fatalf("took %v", got)
	}
	if !slices.Equal(got, choose(all(), budget, 1)) {
		t.Error("the same seed chose something else")
	}
	// Nothing takes more inodes than there are.
	tiny := make([]source, 1000)
	if n := len(choose(tiny, 1<<20, 1)); n != 64 {
		t.Errorf("took %d empty files", n)
	}
}

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

func TestSameSeesEveryDifference(t *testing.T) {
	disk := bytes.Repeat([]byte{1, 2, 3}, 1<<20) // ends in the middle of a read
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, disk, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := same(path, bytes.NewReader(disk)); err != nil {
		t.Fatal(err)
	}
	other := slices.Clone(disk)
	other[len(other)-1]++
	for name, b := range map[string][]byte{"last byte": other, "shorter": disk[:len(disk)-1], "longer": append(slices.Clone(disk), 0), "empty": nil, "much shorter": disk[:1<<20]} {
		if err := same(path, bytes.NewReader(b)); !errors.Is(err, errDiffers) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	broken := errors.New("broken")
	if err := same(path, iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}
