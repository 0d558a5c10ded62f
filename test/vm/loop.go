package testvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	loopControl = "/dev/loop-control"
	loopMajor   = 7
)

// LoopOptions of a loop device.
type LoopOptions struct {
	// Partscan makes devices for the partitions too, if the kernel was built to
	// read the partition table.
	Partscan bool
	DirectIO bool // bypass the page cache of the file
	ReadOnly bool
}

// AttachLoop makes a block device out of a regular file (LOOP_CONFIGURE, Linux 5.8
// or later; needs root). detach frees it, and fails if somebody still has it open
// after some seconds: it is then freed when that one closes it.
func AttachLoop(ctx context.Context, file string, opts LoopOptions) (dev string, detach func() error, err error) {
	fail := func(err error) (string, func() error, error) {
		return "", nil, fmt.Errorf("loop device for %s: %w", file, err)
	}
	file, err = filepath.Abs(file)
	if err != nil {
		return fail(err)
	}
	mode := os.O_RDWR
	if opts.ReadOnly {
		mode = os.O_RDONLY
	}
	back, err := os.OpenFile(file, mode, 0)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = back.Close() }() // the kernel keeps its own reference
	ctl, err := unix.Open(loopControl, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", loopControl, err))
	}
	defer func() { _ = unix.Close(ctl) }()

	cfg := unix.LoopConfig{Fd: uint32(back.Fd())}
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], file)
	if opts.Partscan {
		cfg.Info.Flags |= unix.LO_FLAGS_PARTSCAN
	}
	if opts.DirectIO {
		cfg.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	if opts.ReadOnly {
		cfg.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	for {
		if err := ctx.Err(); err != nil {
			return fail(err)
		}
		n, err := unix.IoctlRetInt(ctl, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fail(fmt.Errorf("no free loop device: %w", err))
		}
		dev, file, err := configureLoop(n, mode, &cfg)
		if errors.Is(err, unix.EBUSY) {
			continue // somebody else was faster
		}
		if err != nil {
			return fail(err)
		}
		return dev, func() error { return detachLoop(dev, file) }, nil
	}
}

// configureLoop turns /dev/loopN into the device that cfg describes. The error
// wraps EBUSY if it is in use.
func configureLoop(n, mode int, cfg *unix.LoopConfig) (string, backing, error) {
	dev := fmt.Sprintf("/dev/loop%d", n)
	fail := func(err error) (string, backing, error) { return "", backing{}, fmt.Errorf("%s: %w", dev, err) }
	fd, err := unix.Open(dev, mode|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		// In a container /dev does not follow the kernel.
		err = unix.Mknod(dev, unix.S_IFBLK|0o600, int(unix.Mkdev(loopMajor, uint32(n))))
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fail(err)
		}
		fd, err = unix.Open(dev, mode|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return fail(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.IoctlLoopConfigure(fd, cfg); err != nil {
		return fail(err)
	}
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err == nil && cfg.Info.Flags&unix.LO_FLAGS_DIRECT_IO > info.Flags&unix.LO_FLAGS_DIRECT_IO {
		// The kernel falls back to the page cache in silence.
		err = errors.New("the file system below cannot do direct I/O")
	}
	if err != nil {
		_ = unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
		return fail(err)
	}
	return dev, backing{info.Device, info.Inode}, nil
}

// detachWait is how long detachLoop waits for others to close the device;
// probes of newly found devices hold it for a moment.
const detachWait = 3 * time.Second

// backing identifies the file behind a loop device.
type backing struct{ device, inode uint64 }

func loopBacking(fd int) (backing, error) {
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return backing{}, err
	}
	return backing{info.Device, info.Inode}, nil
}

// detachLoop frees dev if it still has file behind it: once free, it may be
// somebody else's at any time.
func detachLoop(dev string, file backing) error {
	// bound asks whether dev is still ours, and then calls do.
	bound := func(do func(fd int) error) (bool, error) {
		fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return false, err
		}
		defer func() { _ = unix.Close(fd) }()
		got, err := loopBacking(fd)
		if errors.Is(err, unix.ENXIO) {
			return false, nil
		}
		if err != nil || got != file {
			return false, err
		}
		return true, do(fd)
	}
	_, err := bound(func(fd int) error { return unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0) })
	// With other users the kernel reports success, but frees it only after the
	// last one has closed it.
	for end := time.Now().Add(detachWait); err == nil; time.Sleep(5 * time.Millisecond) {
		var still bool
		still, err = bound(func(int) error { return nil })
		if err == nil && !still {
			return nil
		}
		if time.Now().After(end) {
			err = fmt.Errorf("still in use: %w", unix.EBUSY)
		}
	}
	return fmt.Errorf("detach %s: %w", dev, err)
}
