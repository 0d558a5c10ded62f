package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// headLen is the start of a target that is written last, in bytes.
const headLen = 1 << 20

// headLast copies a disk over what a target holds, so that it does not look
// like a disk while it is neither the old nor the new one.
type headLast struct {
	*copier

	mu    sync.Mutex
	taken bool // the head is durably zero
	err   error
}

// take zeroes the head, once.
func (h *headLast) take() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.taken || h.err != nil {
		return h.err
	}
	if h.err = h.target.zero(context.Background(), 0, min(headLen, h.disk.Size())); h.err == nil {
		h.err = h.target.Sync()
	}
	h.taken = h.err == nil
	return h.err
}

func (h *headLast) copy(ctx context.Context) error {
	head, size := min(headLen, h.disk.Size()), h.disk.Size()
	h.before = h.take
	if err := h.copier.copy(ctx, head, size); err != nil {
		return err
	}
	// The head comes when all else is durable.
	if err := h.target.Sync(); err != nil {
		return h.failed(ofTarget, err)
	}
	h.before = nil
	h.empty, h.blind = h.taken, h.blind && !h.taken
	return h.copier.copy(ctx, 0, head)
}

func writeDevice(ctx context.Context, d bulkDisk, path string, o WriteOptions) (_ WriteResult, err error) {
	// O_EXCL on a block device: nobody else may hold it, a mount for instance.
	f, err := openTarget(path, unix.O_EXCL)
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
	c := &copier{disk: d, target: deviceTarget{f}, options: o, blind: o.Blind}
	c.result.Device = true
	h := &headLast{copier: c}
	if err := h.copy(ctx); err != nil {
		return WriteResult{}, err
	}
	return c.result, c.finish(ctx)
}

// zeroStep is how much of a device is zeroed between looks at the context, in bytes.
const zeroStep = 1 << 30

// zeroDevice zeroes a range, by the device itself for whole sectors if it can.
func zeroDevice(ctx context.Context, f *sparseFile, off, n int64) error {
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

func zeroSectors(f *sparseFile, off, n int64) error {
	span := [2]uint64{uint64(off), uint64(n)}
	err := f.call("BLKZEROOUT", func(fd int) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&span))); errno != 0 {
			return errno
		}
		return nil
	})
	switch {
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		return writeZeroes(f, off, n)
	}
	return err
}
