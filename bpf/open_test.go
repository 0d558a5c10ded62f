package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// openTest attaches a tracker of the test's own, or skips where none can be.
func openTest(t *testing.T, o Options) *Tracker {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: attaching BPF programs needs root")
	}
	o.Dir = testDir(t)
	tr, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = tr.Close()
		if err := Remove(o.Dir); err != nil {
			t.Error(err)
		}
	})
	return tr
}

func testDir(t *testing.T) string {
	return filepath.Join(filepath.Dir(DefaultDir), fmt.Sprintf("tidemark-test-%d-%s", os.Getpid(), strings.NewReplacer("/", "-", ".", "-").Replace(t.Name())))
}

// A process that has nothing left but the pins finds everything as it was.
func TestOpenAdoptsWhatIsPinned(t *testing.T) {
	first := openTest(t, Options{})
	if first.Fresh() == "" {
		t.Error("adopted what was never attached")
	}
	second, err := Open(Options{Dir: first.dir, AdoptOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = second.Close() }()
	if second.Fresh() != "" || !slices.Equal(second.LinkIDs(), first.LinkIDs()) || !second.Since().Equal(first.Since()) {
		t.Errorf("adopted %v since %v (%s), want %v since %v", second.LinkIDs(), second.Since(), second.Fresh(), first.LinkIDs(), first.Since())
	}
}

func TestOpenBeginsAnewAfterAnInterruptedAttach(t *testing.T) {
	first := openTest(t, Options{})
	old := first.LinkIDs()
	_ = first.Close()
	if err := os.Remove(first.pin(pinMeta)); err != nil {
		t.Fatal(err)
	}
	second, err := Open(Options{Dir: first.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = second.Close() }()
	if second.Fresh() == "" || slices.Equal(second.LinkIDs(), old) {
		t.Errorf("adopted half a tracker: %q", second.Fresh())
	}
}

func TestAdoptOnlyAttachesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIP: needs root")
	}
	if _, err := Open(Options{Dir: testDir(t), AdoptOnly: true}); !errors.Is(err, ErrNotAttached) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(testDir(t)); err == nil {
		t.Error("it left a directory")
	}
}

func TestProbeFindsThisKernelGood(t *testing.T) {
	openTest(t, Options{}) // or skip
	for _, c := range Probe() {
		if c.Err != nil {
			t.Errorf("%s: %v", c.Name, c.Err)
		}
	}
}

func TestLookupRefusesWhatIsNoDisk(t *testing.T) {
	for path, want := range map[string]error{"/dev/null": ErrNotBlock, "/": ErrNotBlock, "/nosuch": os.ErrNotExist} {
		if _, err := Lookup(path); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", path, err, want)
		}
	}
}
