package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// sparseFile is a plain file with holes.
type sparseFile struct {
	*os.File
	raw rawControl
}

type rawControl interface{ Control(func(fd uintptr)) error }

func newSparseFile(f *os.File) (*sparseFile, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &sparseFile{File: f, raw: raw}, nil
}

// call runs op on the descriptor, which stays open meanwhile.
func (f *sparseFile) call(name string, op func(fd int) error) error {
	var err error
	if cerr := f.raw.Control(func(fd uintptr) {
		for {
			if err = op(int(fd)); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}); cerr != nil {
		err = os.ErrClosed // the only reason
	}
	if err != nil {
		return &os.PathError{Op: name, Path: f.Name(), Err: err}
	}
	return nil
}

func (f *sparseFile) Punch(off, n int64) error {
	err := f.call("fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	return writeZeroes(f, off, n)
}

// writeZeroes is for where holes cannot be made.
func writeZeroes(w io.WriterAt, off, n int64) error {
	zeroes := make([]byte, min(n, 1<<20))
	for n > 0 {
		m, err := w.WriteAt(zeroes[:min(n, int64(len(zeroes)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(m), n-int64(m)
	}
	return nil
}

func (f *sparseFile) Datasync() error { return f.call("fdatasync", unix.Fdatasync) }

func (f *sparseFile) NextData(off int64) (int64, error) {
	at, err := f.seek(off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, io.EOF
	}
	return at, err
}

func (f *sparseFile) NextHole(off int64) (int64, error) { return f.seek(off, unix.SEEK_HOLE) }

// seek moves the descriptor's offset, which nothing else uses.
func (f *sparseFile) seek(off int64, whence int) (at int64, err error) {
	err = f.call("lseek", func(fd int) (err error) {
		at, err = unix.Seek(fd, off, whence)
		return err
	})
	return at, err
}

// addHoles adds data and holes of a file to m: those of [from, to) of a disk that
// begins at start of the file. It returns false when the sequence is over.
func addHoles(ctx context.Context, m *extentMerger, f interface {
	NextData(off int64) (int64, error)
	NextHole(off int64) (int64, error)
}, start, from, to int64) bool {
	for from < to {
		if err := ctx.Err(); err != nil {
			m.fail(err)
			return false
		}
		data, err := f.NextData(start + from)
		if errors.Is(err, io.EOF) {
			return m.add(from, to, true)
		}
		if err != nil {
			m.fail(err)
			return false
		}
		data = min(data-start, to)
		hole := data
		if data < to {
			if hole, err = f.NextHole(start + data); err != nil {
				m.fail(err)
				return false
			}
			// A file system that cut the hole off in the middle of nowhere must
			// not hold us up.
			hole = min(max(hole-start, data+1), to)
		}
		if !m.add(from, data, true) || !m.add(data, hole, false) {
			return false
		}
		from = hole
	}
	return true
}

func (f *sparseFile) Allocated() (int64, error) {
	var st unix.Stat_t
	err := f.call("fstat", func(fd int) error { return unix.Fstat(fd, &st) })
	return st.Blocks * 512, err
}

// lock makes the process the only one to hold the file, until it is closed.
func (f *sparseFile) lock() error {
	err := f.call("flock", func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w", f.Name(), ErrOverlayBusy)
	}
	return err
}
