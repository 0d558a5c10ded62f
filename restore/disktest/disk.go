package disktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/tidemark/tidemark/restore"
)

// Run checks that the disks that mk makes hold exactly the content they are made of
// and keep the contract of [restore.Disk]. The suite closes a disk that
// implements io.Closer.
func Run(t *testing.T, mk func(t *testing.T, content []byte) restore.Disk) {
	t.Helper()
	shapes := []struct {
		name    string
		content []byte
	}{
		{"one sector", Content(512, 1)},
		{"odd size", Content(70_001, 2)},
		{"mixed", Content(1<<20+3*512, 3)},
		{"all zeroes", make([]byte, 300<<10)},
		{"all data", bytes.Repeat([]byte("tidemark"), 40<<10)},
		{"last sector only", append(make([]byte, 200<<10), Content(512, 9)...)},
	}
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			d := open(t, mk, s.content)
			checkWhole(t, d, s.content)
			checkOddReads(t, d, s.content)
			checkEdges(t, d, s.content)
			checkExtents(t, d, s.content)
		})
	}
	big := Content(2<<20+512, 4)
	t.Run("concurrent readers", func(t *testing.T) { checkConcurrent(t, open(t, mk, big), big) })
	t.Run("cancelled context", func(t *testing.T) { checkCancelled(t, open(t, mk, big), big) })
	t.Run("extents stop when the consumer stops", func(t *testing.T) {
		d := open(t, mk, big)
		for _, err := range d.Extents(t.Context(), 0, d.Size()) {
			if err != nil {
				t.Error(err)
			}
			break
		}
	})
}

func open(t *testing.T, mk func(t *testing.T, content []byte) restore.Disk, content []byte) restore.Disk {
	t.Helper()
	d := mk(t, bytes.Clone(content))
	closeAtEnd(t, d)
	return d
}

func closeAtEnd(t *testing.T, d restore.Disk) {
	if c, ok := d.(io.Closer); ok {
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
}

func checkWhole(t *testing.T, d restore.Disk, content []byte) {
	t.Helper()
	if d.Size() != int64(len(content)) {
		t.Fatalf("size is %d, want %d", d.Size(), len(content))
	}
	got := make([]byte, len(content))
	if n, err := d.ReadAt(got, 0); n != len(got) || err != nil {
		t.Fatalf("reading the whole disk: %d of %d bytes, %v", n, len(got), err)
	}
	if at := differ(got, content); at >= 0 {
		t.Fatalf("content differs at byte %d", at)
	}
}

// checkOddReads reads at and around all offsets where an implementation may
// have a seam, with lengths that straddle them.
func checkOddReads(t *testing.T, d restore.Disk, content []byte) {
	t.Helper()
	var offs []int64
	for _, unit := range []int64{512, 4096, 64 << 10, 256 << 10} {
		for i := range int64(3) {
			offs = append(offs, i*unit-1, i*unit, i*unit+1)
		}
	}
	rnd := rand.New(rand.NewPCG(5, 5))
	for range 20 {
		offs = append(offs, rnd.Int64N(int64(len(content))))
	}
	for _, off := range offs {
		for _, n := range []int64{1, 513, 4096, 65_537, 200_000} {
			if off < 0 || off >= int64(len(content)) {
				continue
			}
			n = min(n, int64(len(content))-off)
			got := bytes.Repeat([]byte{0xa5}, int(n))
			if m, err := d.ReadAt(got, off); m != int(n) || err != nil {
				t.Fatalf("ReadAt(%d bytes, %d): %d, %v", n, off, m, err)
			}
			if at := differ(got, content[off:off+n]); at >= 0 {
				t.Fatalf("ReadAt(%d bytes, %d) differs at %d", n, off, at)
			}
		}
	}
}

func checkEdges(t *testing.T, d restore.Disk, content []byte) {
	t.Helper()
	size := int64(len(content))
	tail := min(size, 700)
	p := bytes.Repeat([]byte{0xa5}, int(tail)+100)
	n, err := d.ReadAt(p, size-tail)
	if n != int(tail) || !errors.Is(err, io.EOF) {
		t.Errorf("read across the end: %d, %v, want %d and io.EOF", n, err, tail)
	} else if differ(p[:n], content[size-tail:]) >= 0 {
		t.Error("read across the end: wrong bytes")
	}
	for _, off := range []int64{size, size + 1, math.MaxInt64 - 10} {
		if n, err := d.ReadAt(make([]byte, 1), off); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("read at %d, behind the end: %d, %v, want 0 and io.EOF", off, n, err)
		}
	}
	if n, err := d.ReadAt(make([]byte, 1), -1); n != 0 || err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read at -1: %d, %v, want 0 and an error", n, err)
	}
	if n, err := d.ReadAt(nil, 0); n != 0 || err != nil {
		t.Errorf("read of nothing: %d, %v", n, err)
	}
}

func checkExtents(t *testing.T, d restore.Disk, content []byte) {
	t.Helper()
	size := int64(len(content))
	spans := [][2]int64{
		{0, size},
		{0, math.MaxInt64},
		{size, 1},
		{size + 5, 10},
		{0, 0},
		{0, 1},
		{size - 1, 1},
		{size - 1, math.MaxInt64},
	}
	rnd := rand.New(rand.NewPCG(6, 6))
	for range 50 {
		off := rnd.Int64N(size)
		spans = append(spans, [2]int64{off, rnd.Int64N(size)})
	}
	for _, s := range spans {
		checkSpan(t, d, content, s[0], s[1])
	}
	for _, err := range d.Extents(t.Context(), -1, 10) {
		if err == nil {
			t.Error("extents at -1: no error")
		}
		break
	}
}

// checkSpan checks that the extents of [off, off+n) cover it exactly and do not lie.
func checkSpan(t testing.TB, d restore.Disk, content []byte, off, n int64) {
	t.Helper()
	if err := spanError(t.Context(), d, content, off, n); err != nil {
		t.Fatal(err)
	}
}

func spanError(ctx context.Context, d restore.Disk, content []byte, off, n int64) error {
	size := int64(len(content))
	at, end := off, off
	if off < size {
		end = off + min(n, size-off)
	}
	for e, err := range d.Extents(ctx, off, n) {
		if err != nil {
			return fmt.Errorf("extents of %d+%d: %w", off, n, err)
		}
		if e.Off != at || e.Len <= 0 || e.Len > end-at {
			return fmt.Errorf("extents of %d+%d: got %+v where %d is next and %d the end", off, n, e, at, end)
		}
		if e.Zero {
			for i, c := range content[e.Off : e.Off+e.Len] {
				if c != 0 {
					return fmt.Errorf("extents of %d+%d: %+v says zero, but byte %d is %#x", off, n, e, e.Off+int64(i), c)
				}
			}
		}
		at += e.Len
	}
	if at != end {
		return fmt.Errorf("extents of %d+%d end at %d, want %d", off, n, at, end)
	}
	return nil
}

func checkConcurrent(t *testing.T, d restore.Disk, content []byte) {
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 7))
			for range 40 {
				off := rnd.IntN(len(content))
				want := content[off:min(off+1+rnd.IntN(200_000), len(content))]
				got := make([]byte, len(want))
				if n, err := d.ReadAt(got, int64(off)); n != len(want) || err != nil {
					t.Errorf("ReadAt(%d bytes, %d): %d, %v", len(want), off, n, err)
					return
				}
				if at := differ(got, want); at >= 0 {
					t.Errorf("ReadAt(%d bytes, %d) differs at %d", len(want), off, at)
					return
				}
				if err := spanError(t.Context(), d, content, int64(off), int64(len(want))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func checkCancelled(t *testing.T, d restore.Disk, content []byte) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var last error
	for _, err := range d.Extents(ctx, 0, d.Size()) {
		if last != nil {
			t.Error("extents went on after an error")
		}
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("extents with a cancelled context ended with %v", last)
	}
	r, ok := d.(restore.ReaderAtContext)
	if !ok {
		return
	}
	got := make([]byte, len(content))
	n, err := r.ReadAtContext(ctx, got, 0)
	if err == nil && n != len(got) {
		t.Errorf("cancelled read returned %d of %d bytes and no error", n, len(got))
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled read: %v", err)
	}
	if differ(got[:n], content[:n]) >= 0 {
		t.Error("cancelled read counts bytes that it did not read")
	}
	// The disk must be none the worse for it.
	if n, err := r.ReadAtContext(t.Context(), got, 0); n != len(got) || err != nil || differ(got, content) >= 0 {
		t.Errorf("read after a cancelled one: %d, %v", n, err)
	}
}

// differ returns where a and b first differ, or -1.
func differ(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
