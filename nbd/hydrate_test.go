package nbd

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// A large write over what lies in the overlay already could go past the disk into its file, where hydration
// would not see it.
func TestLargeWritesOfAGuestAreHydrated(t *testing.T) {
	dir := t.TempDir()
	o, err := restore.CreateOverlay(filepath.Join(dir, "overlay"), disktest.Bytes(disktest.Content(4<<20, 3)), "base")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	l := restore.NewHydratable(o)
	p := serveDisk(t, l, false)
	const off, n = 1 << 20, 300 << 10
	write := func(seed int) {
		t.Helper()
		p.request(0, cmdWrite, uint64(seed), off, n, string(pattern(n, byte(seed))))
		p.getSimple(0).want(t, uint64(seed), 0)
	}
	write(1)
	target := filepath.Join(dir, "native")
	h, err := l.Hydrate(t.Context(), target, restore.HydrateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Close() }()
	write(2)
	if _, err := h.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(target)
	if err != nil || !bytes.Equal(got[off:off+n], pattern(n, 2)) {
		t.Errorf("what was written while it was hydrated is not on the target, %v", err)
	}
}
