package restore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// backing is what an overlay needs of its file. Tests put one in its place
// that forgets what was not synced.
type backing interface {
	io.ReaderAt
	io.WriterAt
	// Punch makes [off, off+n) read as zeroes and frees its space if it can.
	Punch(off, n int64) error
	// Datasync makes all completed writes durable.
	Datasync() error
	// NextData and NextHole return where at or after off the next byte of that
	// kind lies. Past the last data NextData returns io.EOF.
	NextData(off int64) (int64, error)
	NextHole(off int64) (int64, error)
	// Allocated is the space taken, in bytes.
	Allocated() (int64, error)
	Close() error
}

// overlayFile is a backing on a plain file.
type overlayFile struct {
	*os.File
	raw rawControl
}

type rawControl interface{ Control(func(fd uintptr)) error }

func newOverlayFile(f *os.File) (*overlayFile, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &overlayFile{File: f, raw: raw}, nil
}

// call runs op on the descriptor, which stays open meanwhile.
func (f *overlayFile) call(name string, op func(fd int) error) error {
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

func (f *overlayFile) Punch(off, n int64) error {
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

func (f *overlayFile) Datasync() error { return f.call("fdatasync", unix.Fdatasync) }

func (f *overlayFile) NextData(off int64) (int64, error) {
	at, err := f.seek(off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, io.EOF
	}
	return at, err
}

func (f *overlayFile) NextHole(off int64) (int64, error) { return f.seek(off, unix.SEEK_HOLE) }

// seek moves the descriptor's offset, which nothing else uses.
func (f *overlayFile) seek(off int64, whence int) (at int64, err error) {
	err = f.call("lseek", func(fd int) (err error) {
		at, err = unix.Seek(fd, off, whence)
		return err
	})
	return at, err
}

func (f *overlayFile) Allocated() (int64, error) {
	var st unix.Stat_t
	err := f.call("fstat", func(fd int) error { return unix.Fstat(fd, &st) })
	return st.Blocks * 512, err
}

// lock makes the process the only one to hold the file, until it is closed.
func (f *overlayFile) lock() error {
	err := f.call("flock", func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w", f.Name(), ErrOverlayBusy)
	}
	return err
}

// createOverlayFile makes an empty overlay file, durable and locked. The name appears
// only when the file is complete. Its error is os.ErrExist if the name is taken.
func createOverlayFile(path string, shape overlayShape) (_ *overlayFile, err error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, &os.PathError{Op: "create", Path: path, Err: os.ErrExist}
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".new-*")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tmp.Close(), removeIfThere(tmp.Name()))
		}
	}()
	f, err := newOverlayFile(tmp)
	if err != nil {
		return nil, err
	}
	if err := f.lock(); err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(shape.encode(), 0); err != nil {
		return nil, err
	}
	if err := f.Truncate(shape.fileSize()); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	if err := publish(tmp.Name(), path, false); err != nil {
		return nil, err
	}
	return f, nil
}

// openOverlayFile opens and locks an overlay file. The caller has yet to check it.
func openOverlayFile(path string) (*overlayFile, error) {
	of, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	f, err := newOverlayFile(of)
	if err == nil {
		err = f.lock()
	}
	if err != nil {
		return nil, errors.Join(err, of.Close())
	}
	return f, nil
}
