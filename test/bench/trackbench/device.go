package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// device is a block device that may be destroyed, and one beside it, of the same kind, for
// what a layer wants to keep there. Close gives both back.
type device struct {
	name  string
	path  string
	side  string // empty if there is none
	undo  []func() error
	bytes int64
}

func (d *device) Close() error {
	var err error
	for i := len(d.undo) - 1; i >= 0; i-- {
		err = errors.Join(err, d.undo[i]())
	}
	d.undo = nil
	return err
}

// openDevice makes "loop" or "zram" of size bytes, or takes a disk that was given as
// PATH or PATH:SIDE.
func openDevice(ctx context.Context, spec, dir string, size int64, withSide bool) (d *device, err error) {
	d = &device{name: spec}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", spec, err), d.Close())
		}
	}()
	add := func(f func(size int64) (string, error)) error {
		var err error
		if d.path, err = f(size); err != nil || !withSide {
			return err
		}
		d.side, err = f(sideSize(size))
		return err
	}
	switch spec {
	case "loop":
		err = add(func(n int64) (string, error) { return d.loop(ctx, dir, n) })
	case "zram":
		err = add(d.zram)
	default:
		d.path, d.side, _ = strings.Cut(spec, ":")
		d.name = filepath.Base(d.path)
		for _, p := range []string{d.path, d.side} {
			if err == nil && p != "" {
				err = unused(p)
			}
		}
	}
	if err == nil {
		d.bytes, err = sizeOf(d.path)
	}
	return d, err
}

// sideSize has room for a copy of everything and a map of it.
func sideSize(size int64) int64 { return size + size/16 + 8<<20 }

func (d *device) loop(ctx context.Context, dir string, size int64) (string, error) {
	f, err := os.CreateTemp(dir, "tidemark-bench-")
	if err != nil {
		return "", err
	}
	d.undo = append(d.undo, func() error { return os.Remove(f.Name()) })
	// All of it takes memory now, and not while it is measured.
	if err := errors.Join(fill(f, size), f.Close()); err != nil {
		return "", err
	}
	dev, detach, err := testvm.AttachLoop(ctx, f.Name(), testvm.LoopOptions{})
	if err == nil {
		d.undo = append(d.undo, detach)
	}
	return dev, err
}

func fill(f *os.File, size int64) error {
	zero := make([]byte, 1<<20)
	for left := size; left > 0; {
		n, err := f.Write(zero[:min(left, int64(len(zero)))])
		if err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

const zramControl = "/sys/class/zram-control"

func (d *device) zram(size int64) (string, error) {
	b, err := os.ReadFile(filepath.Join(zramControl, "hot_add"))
	if err != nil {
		return "", err
	}
	n := strings.TrimSpace(string(b))
	d.undo = append(d.undo, func() error {
		// Whoever looks at new devices may still have it open.
		var err error
		for range 50 {
			if err = os.WriteFile(filepath.Join(zramControl, "hot_remove"), []byte(n), 0); !errors.Is(err, unix.EBUSY) {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		return err
	})
	dev := "/dev/zram" + n
	if _, err := os.Stat(dev); err != nil {
		return "", fmt.Errorf("no node for a new device: %w", err)
	}
	return dev, os.WriteFile("/sys/block/zram"+n+"/disksize", fmt.Append(nil, size), 0)
}

// unused fails if anybody has the device mounted or exclusively open.
func unused(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open exclusively", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("%s is not a block device", path)
	}
	return nil
}

func sizeOf(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	return f.Seek(0, 2)
}

// wipe makes the beginning of a device look new.
func wipe(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	b, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // page-aligned
	if err == nil {
		_, err = f.WriteAt(b, 0)
		err = errors.Join(err, unix.Munmap(b))
	}
	return errors.Join(err, f.Close())
}
