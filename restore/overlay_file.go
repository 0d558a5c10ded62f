package restore

import (
	"errors"
	"io"
	"os"
	"path/filepath"
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

// createOverlayFile makes an empty overlay file, durable and locked. The name appears
// only when the file is complete. Its error is os.ErrExist if the name is taken.
func createOverlayFile(path string, shape overlayShape) (_ *sparseFile, err error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, &os.PathError{Op: "create", Path: path, Err: os.ErrExist}
	}
	if err := notMoved(path); err != nil {
		return nil, err
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
	f, err := newSparseFile(tmp)
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
	if err := Publish(tmp.Name(), path, false); err != nil {
		return nil, err
	}
	return f, nil
}

// openOverlayFile opens and locks an overlay file. The caller has yet to check it.
func openOverlayFile(path string) (*sparseFile, error) {
	if err := notMoved(path); err != nil {
		return nil, err
	}
	of, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	f, err := newSparseFile(of)
	if err == nil {
		err = f.lock()
	}
	if err == nil {
		err = notMoved(path) // who had it may have moved its disk meanwhile
	}
	if err != nil {
		return nil, errors.Join(err, of.Close())
	}
	return f, nil
}
