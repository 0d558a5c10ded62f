package restore_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

const identity = "5e1f/9b2c/disk0"

func newOverlay(t *testing.T, base restore.Disk) (*restore.Overlay, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "overlay")
	o, err := restore.CreateOverlay(path, base, identity)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.Close() })
	return o, path
}

func TestOverlayIsAWritableDisk(t *testing.T) {
	type made struct {
		path string
		base restore.Disk
	}
	all := map[restore.WritableDisk]made{}
	disktest.RunWritable(t, disktest.Writable{
		New: func(t *testing.T, content []byte) restore.WritableDisk {
			m := made{path: filepath.Join(t.TempDir(), "overlay"), base: disktest.Bytes(content)}
			o, err := restore.CreateOverlay(m.path, m.base, identity)
			if err != nil {
				t.Fatal(err)
			}
			all[o] = m
			return o
		},
		Reopen: func(t *testing.T, d restore.WritableDisk) restore.WritableDisk {
			m := all[d]
			if err := d.(*restore.Overlay).Close(); err != nil {
				t.Fatal(err)
			}
			o, err := restore.OpenOverlay(m.path, m.base, identity)
			if err != nil {
				t.Fatal(err)
			}
			all[o] = m
			return o
		},
	})
}

func TestOverlayOnOverlay(t *testing.T) {
	disktest.Run(t, func(t *testing.T, content []byte) restore.Disk {
		lower, _ := newOverlay(t, disktest.Bytes(make([]byte, len(content))))
		half := len(content) / 2
		if _, err := lower.WriteAt(content[:half], 0); err != nil {
			t.Fatal(err)
		}
		upper, _ := newOverlay(t, lower)
		if _, err := upper.WriteAt(content[half:], int64(half)); err != nil {
			t.Fatal(err)
		}
		return upper
	})
}

func TestOverlayDoesNotTouchItsBase(t *testing.T) {
	content := disktest.Content(1<<20, 1)
	base := bytes.Clone(content)
	o, _ := newOverlay(t, disktest.Bytes(base))
	if _, err := o.WriteAt(disktest.Content(500_000, 2), 3); err != nil {
		t.Fatal(err)
	}
	if err := o.Zero(600_000, 300_000); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(base, content) {
		t.Error("the base changed")
	}
}

func TestOverlayIsSparseAndGivesSpaceBack(t *testing.T) {
	const size = 1 << 38
	o, _ := newOverlay(t, emptyDisk(size))
	if a := o.Allocated(); a > 1<<20 {
		t.Errorf("empty overlay of a 256 GiB disk takes %d bytes", a)
	}
	const n = 8 << 20
	for _, off := range []int64{0, size / 2, size - n} {
		if _, err := o.WriteAt(bytes.Repeat([]byte{1}, n), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.Sync(); err != nil {
		t.Fatal(err)
	}
	if a := o.Allocated(); a < 3*n || a > 3*n+1<<20 {
		t.Errorf("overlay takes %d bytes after writing %d", a, 3*n)
	}
	if err := o.Trim(0, size); err != nil {
		t.Fatal(err)
	}
	if err := o.Sync(); err != nil {
		t.Fatal(err)
	}
	// The bitmap alone: 32 MiB per TiB.
	if a := o.Allocated(); a > 9<<20 {
		t.Errorf("overlay takes %d bytes after trimming all", a)
	}
	for e, err := range o.Extents(t.Context(), 0, size) {
		if err != nil || !e.Zero || e.Len != size {
			t.Errorf("extent after trimming all: %+v, %v", e, err)
		}
	}
}

func TestOverlaySurvivesReopen(t *testing.T) {
	content := disktest.Content(3<<20+512, 3)
	o, path := newOverlay(t, disktest.Bytes(content))
	want := bytes.Clone(content)
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 100 {
		p := disktest.Content(1+rnd.IntN(9000), rnd.Uint64())
		off := rnd.IntN(len(content) - len(p))
		copy(want[off:], p)
		if _, err := o.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	o, err := restore.OpenOrCreateOverlay(path, disktest.Bytes(content), identity)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	got := make([]byte, len(want))
	if _, err := o.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("other content after reopening, %v", err)
	}
}

func TestOverlayRefusesWhatIsNotItsOwn(t *testing.T) {
	base := disktest.Bytes(disktest.Content(1<<20, 4))
	change := func(at int64, b ...byte) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(b, at); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	truncate := func(n int64) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.Truncate(path, n); err != nil {
				t.Fatal(err)
			}
		}
	}
	untouched := func(*testing.T, string) {}
	cases := []struct {
		name   string
		damage func(*testing.T, string)
		base   restore.Disk
		id     string
		want   error
	}{
		{"other identity", untouched, base, "other", restore.ErrOverlayBase},
		{"identity is a prefix", untouched, base, identity[:4], restore.ErrOverlayBase},
		{"other size", untouched, base[:1<<19], identity, restore.ErrOverlayBase},
		{"other magic", change(0, 'X'), base, identity, restore.ErrNotOverlay},
		{"other version", change(8, 2), base, identity, restore.ErrOverlayVersion},
		{"torn header", change(30, 0, 0, 0, 0), base, identity, restore.ErrOverlayCorrupt},
		{"short file", truncate(1 << 19), base, identity, restore.ErrOverlayCorrupt},
		{"only a header", truncate(4096), base, identity, restore.ErrOverlayCorrupt},
		{"half a header", truncate(2048), base, identity, restore.ErrNotOverlay},
		{"empty file", truncate(0), base, identity, restore.ErrNotOverlay},
		{"bits behind the end", change(4096+32, 1), base, identity, restore.ErrOverlayCorrupt},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			o, path := newOverlay(t, base)
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			c.damage(t, path)
			o, err := restore.OpenOrCreateOverlay(path, c.base, c.id)
			if err == nil {
				_ = o.Close()
			}
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if err != nil && !strings.Contains(err.Error(), path) {
				t.Errorf("%v does not name the file", err)
			}
		})
	}
}

func TestOverlayHasOneUser(t *testing.T) {
	base := disktest.Bytes(disktest.Content(1<<20, 5))
	o, path := newOverlay(t, base)
	if _, err := restore.OpenOverlay(path, base, identity); !errors.Is(err, restore.ErrOverlayBusy) {
		t.Errorf("second open: %v, want %v", err, restore.ErrOverlayBusy)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := restore.OpenOverlay(path, base, identity)
	if err != nil {
		t.Fatalf("open after close: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func TestCreateOverlayDoesNotReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := restore.CreateOverlay(path, emptyDisk(4096), identity); !errors.Is(err, os.ErrExist) {
		t.Errorf("got %v, want %v", err, os.ErrExist)
	}
	if p, err := os.ReadFile(path); err != nil || string(p) != "precious" {
		t.Errorf("the file is %q now, %v", p, err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestCreateOverlayNeedsAnIdentity(t *testing.T) {
	for _, id := range []string{"", strings.Repeat("x", 1025)} {
		_, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "o"), emptyDisk(4096), id)
		if !errors.Is(err, restore.ErrOverlayIdentity) {
			t.Errorf("identity of %d bytes: %v", len(id), err)
		}
	}
}

func TestOverlayPassesOnErrorsOfItsBase(t *testing.T) {
	broken := errors.New("broken")
	base := brokenDisk{Bytes: disktest.Bytes(disktest.Content(1<<20, 6)), from: 8192, to: 12288, err: broken}
	o, _ := newOverlay(t, base)
	p := make([]byte, 1<<20)
	if n, err := o.ReadAt(p, 0); n > 8192 || !errors.Is(err, broken) {
		t.Errorf("read over a broken block: %d, %v", n, err)
	}
	if _, err := o.WriteAt([]byte("x"), 8200); !errors.Is(err, broken) {
		t.Errorf("copy-up of a broken block: %v", err)
	}
	// Failed writes must not show the half of it.
	if _, err := o.ReadAt(p[:1], 8200); !errors.Is(err, broken) {
		t.Errorf("read of a broken block after a failed write: %v", err)
	}
	// A whole block needs nothing of the base.
	if _, err := o.WriteAt(bytes.Repeat([]byte("y"), 4096), 8192); err != nil {
		t.Error(err)
	}
	if _, err := o.ReadAt(p, 0); err != nil {
		t.Errorf("after the broken block was written over: %v", err)
	}
}

func TestClosedOverlayFails(t *testing.T) {
	o, _ := newOverlay(t, disktest.Bytes(disktest.Content(8192, 7)))
	if _, err := o.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	_, werr := o.WriteAt([]byte("x"), 0)
	_, rerr := o.ReadAt(make([]byte, 1), 0)
	for name, err := range map[string]error{"write": werr, "read": rerr, "sync": o.Sync(), "zero": o.Zero(0, 4096)} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: %v, want %v", name, err, os.ErrClosed)
		}
	}
}
