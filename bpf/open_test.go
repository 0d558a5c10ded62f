package bpf

import (
	"os"
	"path/filepath"
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
	return filepath.Join(filepath.Dir(DefaultDir), strings.NewReplacer("/", "-", ".", "-").Replace("tidemark-test-"+t.Name()))
}

func TestLoads(t *testing.T) {
	tr := openTest(t, Options{})
	t.Log(tr.Fresh(), tr.LinkIDs())
}
