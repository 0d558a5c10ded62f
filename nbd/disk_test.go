package nbd

import (
	"context"
	"errors"
	"io"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// memDisk is a sparse disk in memory.
type memDisk struct {
	mu    sync.RWMutex
	pages map[int64][]byte
	size  int64
	syncs int
}

const memPage = 64 << 10

var _ restore.WritableDisk = (*memDisk)(nil)

func newMemDisk(size int64) *memDisk { return &memDisk{pages: map[int64][]byte{}, size: size} }

func (d *memDisk) Size() int64 { return d.size }

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	n := 0
	for n < len(p) && off < d.size {
		k := int(min(int64(len(p)-n), memPage-off%memPage, d.size-off))
		if page := d.pages[off/memPage]; page != nil {
			copy(p[n:n+k], page[off%memPage:])
		} else {
			clear(p[n : n+k])
		}
		n, off = n+k, off+int64(k)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *memDisk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off+int64(len(p)) > d.size {
		return 0, io.ErrShortWrite
	}
	n := 0
	for n < len(p) {
		page := d.pages[off/memPage]
		if page == nil {
			page = make([]byte, memPage)
			d.pages[off/memPage] = page
		}
		k := copy(page[off%memPage:], p[n:])
		n, off = n+k, off+int64(k)
	}
	return n, nil
}

func (d *memDisk) Zero(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for n > 0 {
		k := min(n, memPage-off%memPage)
		if page := d.pages[off/memPage]; page != nil {
			if k == memPage {
				delete(d.pages, off/memPage)
			} else {
				clear(page[off%memPage : off%memPage+k])
			}
		}
		off, n = off+k, n-k
	}
	return nil
}

func (d *memDisk) Trim(off, n int64) error { return d.Zero(off, n) }

func (d *memDisk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.syncs++
	return nil
}

func (d *memDisk) Extents(ctx context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) {
		end := min(off+n, d.size)
		for off < end {
			if err := ctx.Err(); err != nil {
				yield(restore.Extent{}, err)
				return
			}
			k := min(end-off, memPage-off%memPage)
			d.mu.RLock()
			zero := d.pages[off/memPage] == nil
			d.mu.RUnlock()
			if !yield(restore.Extent{Off: off, Len: k, Zero: zero}, nil) {
				return
			}
			off += k
		}
	}
}

// fileDisk is a disk in one plain file.
type fileDisk struct {
	f    *os.File
	size int64
}

var (
	_ restore.WritableDisk = (*fileDisk)(nil)
	_ restore.Filer        = (*fileDisk)(nil)
	_ restore.WriteFiler   = (*fileDisk)(nil)
	_ FastZeroer           = (*fileDisk)(nil)
)

func newFileDisk(t testing.TB, size int64) *fileDisk {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return &fileDisk{f: f, size: size}
}

func (d *fileDisk) Size() int64                              { return d.size }
func (d *fileDisk) ReadAt(p []byte, off int64) (int, error)  { return d.f.ReadAt(p, off) }
func (d *fileDisk) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }
func (d *fileDisk) Trim(off, n int64) error                  { return d.Zero(off, n) }
func (d *fileDisk) Sync() error                              { return d.f.Sync() }
func (d *fileDisk) File(_, _ int64) (uintptr, bool)          { return d.f.Fd(), true }
func (d *fileDisk) WriteFile(off, _ int64) (uintptr, int64, bool) {
	return d.f.Fd(), off, true
}
func (d *fileDisk) ZeroIsFast(_, _ int64) bool { return true }

func (d *fileDisk) Zero(off, n int64) error {
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d *fileDisk) Extents(_ context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) {
		end := min(off+n, d.size)
		for off < end {
			data, err := unix.Seek(int(d.f.Fd()), off, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				data, err = end, nil
			}
			if err != nil {
				yield(restore.Extent{}, err)
				return
			}
			if data = min(data, end); data > off && !yield(restore.Extent{Off: off, Len: data - off, Zero: true}, nil) {
				return
			}
			off = data
			if off == end {
				return
			}
			hole, err := unix.Seek(int(d.f.Fd()), off, unix.SEEK_HOLE)
			if err != nil {
				yield(restore.Extent{}, err)
				return
			}
			hole = min(hole, end)
			if !yield(restore.Extent{Off: off, Len: hole - off}, nil) {
				return
			}
			off = hole
		}
	}
}

// newOverlay is one over zeroes.
func newOverlay(t testing.TB, size int) *restore.Overlay {
	t.Helper()
	o, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "overlay"), disktest.Bytes(make([]byte, size)), "base")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.Close() })
	return o
}

// plain hides that a disk lies in a file.
type plain struct{ restore.WritableDisk }

// hooked calls functions before the operations of a disk; their errors are
// returned instead.
type hooked struct {
	restore.WritableDisk
	read  func(off int64, n int) error
	write func(off int64, n int) error
	sync  func() error
	zero  func() error
}

func (h *hooked) ReadAt(p []byte, off int64) (int, error) {
	if h.read != nil {
		if err := h.read(off, len(p)); err != nil {
			return 0, err
		}
	}
	return h.WritableDisk.ReadAt(p, off)
}

func (h *hooked) WriteAt(p []byte, off int64) (int, error) {
	if h.write != nil {
		if err := h.write(off, len(p)); err != nil {
			return 0, err
		}
	}
	return h.WritableDisk.WriteAt(p, off)
}

func (h *hooked) Zero(off, n int64) error {
	if h.zero != nil {
		if err := h.zero(); err != nil {
			return err
		}
	}
	return h.WritableDisk.Zero(off, n)
}

func (h *hooked) Sync() error {
	if h.sync != nil {
		if err := h.sync(); err != nil {
			return err
		}
	}
	return h.WritableDisk.Sync()
}
