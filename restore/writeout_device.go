package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// deviceHead is the start of a device that is written last, in bytes.
const deviceHead = 1 << 20

func writeDevice(ctx context.Context, d Disk, path string, o WriteOptions) (_ WriteResult, err error) {
	// O_EXCL on a block device: nobody else may hold it, a mount for instance.
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return WriteResult{}, fmt.Errorf("%s: %w", path, ErrBusy)
	}
	if err != nil {
		return WriteResult{}, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return WriteResult{}, err
	}
	if size < d.Size() {
		return WriteResult{}, fmt.Errorf("%s has %d bytes, the disk %d: %w", path, size, d.Size(), ErrTooSmall)
	}
	c := newCopier(d, f, o)
	c.zero = func(off, n int64) error { return zeroDevice(ctx, f, off, n) }
	head := min(deviceHead, d.Size())
	if err := c.zero(0, head); err != nil {
		return WriteResult{}, err
	}
	for _, span := range [][2]int64{{head, d.Size()}, {0, head}} {
		// The head is durably zero before anything else is there, and written when all
		// else is durable.
		if err := f.Sync(); err != nil {
			return WriteResult{}, err
		}
		if err := c.copy(ctx, span[0], span[1]); err != nil {
			return WriteResult{}, err
		}
	}
	if err := f.Sync(); err != nil {
		return WriteResult{}, err
	}
	c.result.Device = true
	return c.result, nil
}

// zeroStep is how much of a device is zeroed between looks at the context, in bytes.
const zeroStep = 1 << 30

// zeroDevice zeroes a range, by the device itself for whole sectors if it can.
func zeroDevice(ctx context.Context, f *os.File, off, n int64) error {
	const sector = 4096 // the largest logical block there is
	from, to := (off+sector-1)/sector*sector, (off+n)/sector*sector
	if from >= to {
		return writeZeroes(f, off, n)
	}
	if err := writeZeroes(f, off, from-off); err != nil {
		return err
	}
	for from < to {
		if err := ctx.Err(); err != nil {
			return err
		}
		step := min(to-from, zeroStep)
		if err := zeroSectors(f, from, step); err != nil {
			return err
		}
		from += step
	}
	return writeZeroes(f, to, off+n-to)
}

func zeroSectors(f *os.File, off, n int64) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	span := [2]uint64{uint64(off), uint64(n)}
	var errno unix.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, unix.BLKZEROOUT, uintptr(unsafe.Pointer(&span)))
	}); err != nil {
		return err
	}
	switch errno {
	case 0:
		return nil
	case unix.ENOTTY, unix.EOPNOTSUPP, unix.EINVAL:
		return writeZeroes(f, off, n)
	}
	return &os.PathError{Op: "BLKZEROOUT", Path: f.Name(), Err: errno}
}
