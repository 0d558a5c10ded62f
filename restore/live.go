package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// livePiece is what one read of a Live disk asks of the device at most, in bytes.
const livePiece = 1 << 20

// directUnit is what offset, length and memory of direct reads are a multiple of, in bytes. No device
// here has larger sectors.
const directUnit = 4096

// Span is a run of bytes of a disk.
type Span struct {
	Off, Len int64
}

// Live is a block device that others write to, as a Disk. It breaks that contract in one way: it is not
// immutable. A read shows the device as it is at that moment, past this host's page cache but coherently
// with it, and two reads show two moments.
//
// It knows which parts changed since some earlier state, because it was told: [Live.Diff] against
// [Live.Base]. It remembers which of them were read.
type Live struct {
	f    *os.File
	name string
	size int64
	bufs sync.Pool

	changed []Span // ascending, apart from each other

	mu     sync.Mutex
	unread []Span // of changed, ascending
}

var (
	_ Disk            = (*Live)(nil)
	_ Differ          = (*Live)(nil)
	_ ReaderAtContext = (*Live)(nil)
)

// OpenLive opens a block device. While it is open no other can take its name.
func OpenLive(path string) (_ *Live, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		return nil, fmt.Errorf("%s: not a block device", path)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // only read from
		}
	}()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("%s: size: %w", path, err)
	}
	d := &Live{f: f, name: path, size: size}
	d.bufs.New = func() any { b := directBuffer(livePiece + 2*directUnit); return &b }
	return d, nil
}

func directBuffer(n int) []byte {
	b := make([]byte, n+directUnit)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (directUnit - 1)
	return b[skip:][:n:n]
}

// SetChanged says what changed since the state that [Live.Base] stands for: ascending runs that don't touch,
// within the disk. It must be called before the disk is used by others.
func (d *Live) SetChanged(changed []Span) {
	d.changed, d.unread = slices.Clone(changed), slices.Clone(changed)
}

// File is the device, for looking at what it is. It belongs to d.
func (d *Live) File() *os.File { return d.f }

// Size is the device's size in bytes when it was opened.
func (d *Live) Size() int64 { return d.size }

// Close closes the device.
func (d *Live) Close() error { return d.f.Close() }

// Sync makes what lies in the host's page cache reach the device.
func (d *Live) Sync() error {
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	if err := unix.SyncFileRange(int(d.f.Fd()), 0, 0, all); err != nil {
		return fmt.Errorf("sync %s: %w", d.name, err)
	}
	return nil
}

// ReadAt implements [Disk].
func (d *Live) ReadAt(p []byte, off int64) (int, error) {
	return d.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext implements [ReaderAtContext].
func (d *Live) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, ErrRange
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= d.size {
		return 0, io.EOF
	}
	want := int(min(int64(len(p)), d.size-off))
	done := 0
	for done < want {
		if err := ctx.Err(); err != nil {
			return done, err
		}
		n, err := d.readPiece(p[done:min(want, done+livePiece)], off+int64(done))
		d.noteRead(off+int64(done), int64(n))
		done += n
		if err != nil {
			return done, err
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

// readPiece reads at most livePiece bytes within the disk.
func (d *Live) readPiece(p []byte, off int64) (int, error) {
	buf := d.bufs.Get().(*[]byte)
	defer d.bufs.Put(buf)
	from := off &^ (directUnit - 1)
	to := (off + int64(len(p)) + directUnit - 1) &^ (directUnit - 1)
	n, err := d.f.ReadAt((*buf)[:to-from], from)
	got := copy(p, (*buf)[min(off-from, int64(n)):n])
	if got == len(p) {
		return got, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // the device shrank
	}
	return got, fmt.Errorf("read %s at %d: %w", d.name, off, err)
}

// Extents implements [Disk]: nobody knows where a device has holes.
func (d *Live) Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		from, to, err := extentSpan(off, n, d.size)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			yield(Extent{}, err)
			return
		}
		if from < to {
			yield(Extent{Off: from, Len: to - from}, nil)
		}
	}
}

// Base stands for the earlier state: it can be compared with, and not be read.
func (d *Live) Base() Disk { return liveBase{d} }

// Diff implements [Differ].
func (d *Live) Diff(ctx context.Context, old Disk, off, n int64) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		from, to, err := extentSpan(off, n, d.size)
		if err == nil {
			err = ctx.Err()
		}
		if base, ok := old.(liveBase); err == nil && (!ok || base.of != d) {
			err = fmt.Errorf("%s: %w: the other is not what it is tracked from", d.name, ErrIncomparable)
		}
		if err != nil {
			yield(Change{}, err)
			return
		}
		i, _ := slices.BinarySearchFunc(d.changed, from, func(s Span, at int64) int {
			if s.Off+s.Len <= at {
				return -1
			}
			return 1
		})
		for _, s := range d.changed[i:] {
			begin, end := max(s.Off, from), min(s.Off+s.Len, to)
			if begin >= end {
				return
			}
			if !yield(Change{Off: begin, Len: end - begin}, nil) {
				return
			}
		}
	}
}

// noteRead remembers that [off, off+n) was read.
func (d *Live) noteRead(off, n int64) {
	if n <= 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	i, _ := slices.BinarySearchFunc(d.unread, off, func(s Span, at int64) int {
		if s.Off+s.Len <= at {
			return -1
		}
		return 1
	})
	j := i
	var left []Span
	for ; j < len(d.unread) && d.unread[j].Off < off+n; j++ {
		s := d.unread[j]
		if s.Off < off {
			left = append(left, Span{s.Off, off - s.Off})
		}
		if end := s.Off + s.Len; end > off+n {
			left = append(left, Span{off + n, end - off - n})
		}
	}
	d.unread = slices.Replace(d.unread, i, j, left...)
}

// Unread is how many bytes that changed were not read yet.
func (d *Live) Unread() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return spanned(d.unread)
}

// Changed is how many bytes changed.
func (d *Live) Changed() int64 { return spanned(d.changed) }

func spanned(spans []Span) (n int64) {
	for _, s := range spans {
		n += s.Len
	}
	return n
}

// liveBase is what a Live disk was once.
type liveBase struct{ of *Live }

var errNotKept = errors.New("this state of the disk was not kept")

func (b liveBase) Size() int64                       { return b.of.size }
func (b liveBase) ReadAt([]byte, int64) (int, error) { return 0, errNotKept }
func (b liveBase) Extents(context.Context, int64, int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) { yield(Extent{}, errNotKept) }
}
