package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotRaw is wrapped when something is neither a regular file nor a block device.
	ErrNotRaw = errors.New("neither a file nor a block device")
	// ErrRawBusy is wrapped when others use a file or device to which is to be written.
	ErrRawBusy = errors.New("in use")
)

// RawDisk is a disk that lies byte for byte in a file or block device, such as one that a
// point was restored to. Its space can be given back where the file system or device can.
type RawDisk struct {
	f      *sparseFile
	size   int64
	device bool

	mu     sync.Mutex
	broken error // why nothing can be made durable any more
}

var (
	_ WritableDisk = (*RawDisk)(nil)
	_ Filer        = (*RawDisk)(nil)
	_ WriteFiler   = (*RawDisk)(nil)
	_ io.Closer    = (*RawDisk)(nil)
)

// rawBlock is what devices give back space in, in bytes, or a multiple.
const rawBlock = 4 << 10

// OpenRaw opens a file or block device. If it is not writable, writes fail. Else it is
// locked (flock, O_EXCL of devices) against others that do so too, and the
// error is [ErrRawBusy] if there are; QEMU's locks are not seen. The disk must be closed.
func OpenRaw(path string, writable bool) (*RawDisk, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	device := st.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice
	if !device && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", path, ErrNotRaw)
	}
	flags := os.O_RDONLY
	if writable {
		flags = os.O_RDWR
		if device {
			flags |= unix.O_EXCL
		}
	}
	of, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%s: %w", path, ErrRawBusy)
	}
	if err != nil {
		return nil, err
	}
	d := &RawDisk{device: device}
	if d.f, err = newSparseFile(of); err == nil && writable {
		if err = d.f.lock(); errors.Is(err, ErrOverlayBusy) {
			err = fmt.Errorf("%s: %w", path, ErrRawBusy)
		}
	}
	if err == nil {
		d.size, err = of.Seek(0, io.SeekEnd)
	}
	if err != nil {
		return nil, errors.Join(err, of.Close())
	}
	return d, nil
}

// Close closes the file. What was not synced is durable when the kernel sees fit.
func (d *RawDisk) Close() error { return d.f.Close() }

// Size is that of the file or device when it was opened.
func (d *RawDisk) Size() int64 { return d.size }

// ReadAt implements io.ReaderAt.
func (d *RawDisk) ReadAt(p []byte, off int64) (int, error) {
	total, eof := readSpan(off, len(p), d.size)
	n, err := d.f.ReadAt(p[:total], off)
	if n < total {
		return n, noEOF(err)
	}
	return n, eof
}

// WriteAt implements io.WriterAt. A write outside the disk fails as a whole with [ErrRange].
func (d *RawDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := checkWrite("write", off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	return d.f.WriteAt(p, off)
}

// File implements [Filer]. A read that is sent while others write the same bytes shows what
// was there before, after, or partly so, as any read of a file does.
func (d *RawDisk) File(off, n int64) (uintptr, bool) {
	return d.f.Fd(), off >= 0 && n >= 0 && n <= d.size-off
}

// WriteFile implements [WriteFiler].
func (d *RawDisk) WriteFile(off, n int64) (fd uintptr, at int64, ok bool) {
	return d.f.Fd(), off, checkWrite("write", off, n, d.size) == nil
}

// Zero makes a hole of [off, off+n), of the whole blocks in it on a device, or writes zeroes
// where that can't be done.
func (d *RawDisk) Zero(off, n int64) error {
	if err := checkWrite("zero", off, n, d.size); err != nil || n == 0 {
		return err
	}
	if !d.device {
		return d.f.Punch(off, n)
	}
	from, to := (off+rawBlock-1)&^(rawBlock-1), (off+n)&^(rawBlock-1)
	if from >= to {
		return writeZeroes(d.f, off, n)
	}
	if err := writeZeroes(d.f, off, from-off); err != nil {
		return err
	}
	if err := writeZeroes(d.f, to, off+n-to); err != nil {
		return err
	}
	return d.f.Punch(from, to-from)
}

// Trim does what Zero does.
func (d *RawDisk) Trim(off, n int64) error { return d.Zero(off, n) }

// Sync makes all writes that completed before it durable. Once it failed it fails always: the
// kernel may have dropped what it could not write.
func (d *RawDisk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken != nil {
		return d.broken
	}
	if err := d.f.Datasync(); err != nil {
		d.broken = fmt.Errorf("writes may be lost: %w", err)
	}
	return d.broken
}

// Extents tells the file's holes. A device is all data.
func (d *RawDisk) Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		from, to, err := extentSpan(off, n, d.size)
		if err != nil {
			yield(Extent{}, err)
			return
		}
		m := &extentMerger{yield: yield}
		if err := ctx.Err(); err != nil {
			m.fail(err)
			return
		}
		if d.device {
			m.add(from, to, false)
		} else if !addHoles(ctx, m, d.f, 0, from, to) {
			return
		}
		m.flush()
	}
}
