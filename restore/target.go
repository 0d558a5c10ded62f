package restore

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// target is what a disk is written to: a file or a block device.
type target interface {
	io.ReaderAt
	io.WriterAt

	// zero makes [off, off+n) read as zeroes and gives the space back where that can
	// be done.
	zero(ctx context.Context, off, n int64) error

	// data returns the next run at or after off that may hold something, cut to
	// end; from is end if there is none.
	data(off, end int64) (from, to int64, err error)

	// Sync makes all that was written durable.
	Sync() error

	// forget drops what the page cache holds, so that reads come from the disk.
	forget() error
}

// fileTarget is a plain file.
type fileTarget struct{ *sparseFile }

func (f fileTarget) zero(_ context.Context, off, n int64) error { return f.Punch(off, n) }

func (f fileTarget) data(off, end int64) (from, to int64, err error) {
	from, err = f.NextData(off)
	if errors.Is(err, io.EOF) || err == nil && from >= end {
		return end, end, nil
	}
	if err != nil {
		return 0, 0, err
	}
	to, err = f.NextHole(from)
	return from, min(max(to, from+1), end), err
}

func (f fileTarget) forget() error {
	return f.call("fadvise", func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
}

// deviceTarget is a block device.
type deviceTarget struct{ *sparseFile }

func (d deviceTarget) zero(ctx context.Context, off, n int64) error {
	return zeroDevice(ctx, d.sparseFile, off, n)
}

func (d deviceTarget) data(off, end int64) (from, to int64, err error) { return off, end, nil }

func (d deviceTarget) forget() error { return fileTarget(d).forget() }

// alone makes sure that nobody else has a plain file open. It looks once: a lease can be
// had only on a file that is open nowhere else.
func (f *sparseFile) alone() error {
	err := f.call("fcntl", func(fd int) error {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
		return err
	})
	switch {
	case errors.Is(err, unix.EAGAIN):
		return ErrBusy
	case err != nil:
		return nil //nolint:nilerr // a file system without leases (NFS): it cannot be told
	}
	return f.call("fcntl", func(fd int) error {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
		return err
	})
}

// openTarget opens what exists for comparing and writing.
func openTarget(path string, flags int) (*sparseFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|flags, 0)
	if err != nil {
		return nil, err
	}
	s, err := newSparseFile(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}
