package blob

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// TailReader is implemented by stores that can read the end of an object whose
// size is not known in one request.
type TailReader interface {
	// ReadTail reads the last len(p) bytes of an object into p, or all of it if
	// it is shorter, and tells the object's size in bytes. n is the smaller of the
	// two unless err is set. The error wraps ErrNotFound if there is no such
	// object.
	ReadTail(ctx context.Context, name string, p []byte) (n int, size int64, err error)
}

// ReadTail is [TailReader] for every store: with Stat and ReadAt where it is
// not implemented.
func ReadTail(ctx context.Context, s Store, name string, p []byte) (n int, size int64, err error) {
	if t, ok := s.(TailReader); ok {
		return t.ReadTail(ctx, name, p)
	}
	info, err := s.Stat(ctx, name)
	if err != nil {
		return 0, 0, err
	}
	want := min(int64(len(p)), info.Size)
	n, err = s.ReadAt(ctx, name, p[:want], info.Size-want)
	if int64(n) == want {
		err = nil
	} else if err == nil || errors.Is(err, io.EOF) {
		err = fmt.Errorf("read %s: %w", name, io.ErrUnexpectedEOF)
	}
	return n, info.Size, err
}

var _ TailReader = (*Dir)(nil)

// ReadTail implements [TailReader].
func (d *Dir) ReadTail(ctx context.Context, name string, p []byte) (n int, size int64, err error) {
	n, size, err = d.readTail(ctx, name, p)
	if err != nil {
		err = fmt.Errorf("read %s: %w", name, err)
	}
	return n, size, err
}

func (d *Dir) readTail(ctx context.Context, name string, p []byte) (n int, size int64, err error) {
	fd, err := d.openFD(ctx, name)
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = unix.Close(fd) }() // read only: nothing to lose
	var st unix.Stat_t
	if _, err := again(func() (int, error) { return 0, unix.Fstat(fd, &st) }); err != nil {
		return 0, 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, 0, fmt.Errorf("%w: not a file", ErrNotFound)
	}
	want := min(int64(len(p)), st.Size)
	n, err = preadFull(fd, p[:want], st.Size-want)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, st.Size, err
}
