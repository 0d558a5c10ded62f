package bpf

import (
	"path/filepath"
	"slices"
	"testing"
)

func TestFirstCopies(t *testing.T) {
	if one, all, told := firstCopies(Options{}, true), firstCopies(Options{}, false), firstCopies(Options{Copies: 2}, true); one != 1 || all != 3 || told != 2 {
		t.Errorf("%d where calls are whole, %d where they are not, %d of 2", one, all, told)
	}
}

// What is not attached vouches for nothing.
func TestMissesOfAbsentCopies(t *testing.T) {
	for attached, want := range map[int]Misses{
		1: {1, 1, 1, 4, 4, 4, 0, 0, 0},
		2: {1, 2, 1, 4, 5, 4, 0, 8, 0},
		3: {1, 2, 3, 4, 5, 6, 0, 8, 9},
	} {
		m := Misses{1, 2, 3, 4, 5, 6, 0, 8, 9}
		if m.fill(attached); m != want {
			t.Errorf("%d attached: %v, want %v", attached, m, want)
		}
	}
}

func TestStrayLanding(t *testing.T) {
	for _, c := range []struct {
		ever     Misses
		attached int
		vouched  uint64
		want     bool
	}{
		{Misses{}, 1, 0, false},
		{Misses{1, 1, 1, 0, 0, 0, 0, 0, 0}, 1, 0, false},
		{Misses{0, 0, 0, 1, 1, 1, 1, 1, 1}, 1, 0, false},
		{Misses{1, 1, 1, 0, 0, 0, 1, 1, 1}, 1, 0, true},
		{Misses{1, 0, 0, 0, 0, 0, 1, 1, 1}, 3, 0, false},
		{Misses{1, 1, 1, 0, 0, 0, 1, 1, 0}, 3, 0, false}, // the last one gives entries back
		{Misses{1, 1, 1, 0, 0, 0, 0, 0, 1}, 3, 0, true},
		{Misses{1, 1, 1, 0, 0, 0, 0, 0, 1}, 3, 1, false}, // no submission was missed by all
		{Misses{1, 1, 1, 0, 0, 0, 0, 0, 1}, 3, 6, true},
	} {
		if got := strayLanding(c.ever[:], c.attached, c.vouched); got != c.want {
			t.Errorf("%+v: got %v", c, got)
		}
	}
}

// However many copies are pinned, all of them are adopted, and none is looked for that is not.
func TestOpenAdoptsEachCopy(t *testing.T) {
	for n := 1; n <= copies; n++ {
		t.Run(programName(n-1), func(t *testing.T) {
			first := openTest(t, Options{Copies: n})
			pinned, err := filepath.Glob(first.pin("link-*_[0-9]"))
			if err != nil || len(pinned) != n*len(programs) {
				t.Errorf("pinned %v, %v", pinned, err)
			}
			second, err := Open(Options{Dir: first.dir, AdoptOnly: true, Misses: func(Misses) Misses { return Misses{} }})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = second.Close() }()
			if second.Copies() != n || len(second.LinkIDs()) != len(pinned) || !slices.Equal(second.LinkIDs(), first.LinkIDs()) || second.Outdated() != "" || !second.intact() {
				t.Errorf("%d copies, links %v, want %d and %v; outdated %q", second.Copies(), second.LinkIDs(), n, first.LinkIDs(), second.Outdated())
			}
		})
	}
}

// Versions that did not write down how many copies there are attached three.
func TestOpenAdoptsCopiesThatWereNotCounted(t *testing.T) {
	first := openTest(t, Options{Copies: 3})
	if err := first.meta.Put(uint32(metaCopies), uint64(0)); err != nil {
		t.Fatal(err)
	}
	second, err := Open(Options{Dir: first.dir, AdoptOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = second.Close() }()
	if second.Copies() != 3 || !slices.Equal(second.LinkIDs(), first.LinkIDs()) {
		t.Errorf("%d copies, links %v", second.Copies(), second.LinkIDs())
	}
}
