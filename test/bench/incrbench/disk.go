package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/test/bench/measure"
	testvm "github.com/tidemark/tidemark/test/vm"
)

// makeDisk makes a loop device that holds an ext4 file system full of files.
func (b *bench) makeDisk(ctx context.Context) (dev string, detach func() error, err error) {
	image := filepath.Join(b.dir, "disk.raw")
	f, err := os.Create(image)
	if err != nil {
		return "", nil, err
	}
	if err := errors.Join(f.Truncate(b.size), f.Close()); err != nil {
		return "", nil, err
	}
	if dev, detach, err = testvm.AttachLoop(ctx, image, testvm.LoopOptions{DirectIO: !b.cached}); err != nil {
		return "", nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, detach())
		}
	}()
	if err := command(ctx, "mkfs.ext4", "-q", "-F", dev); err != nil {
		return "", nil, err
	}
	mnt := filepath.Join(b.dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		return "", nil, err
	}
	if err := unix.Mount(dev, mnt, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return "", nil, fmt.Errorf("mount %s: %w", dev, err)
	}
	n, bytes, err := fill(ctx, mnt, b.from, b.size*8/10, b.seed)
	if err == nil {
		b.say("the disk holds %d files, %d MiB", n, bytes>>20)
	}
	return dev, detach, errors.Join(err, unix.Unmount(mnt, 0))
}

// forget drops what the page cache holds of the device: who reads through it would be fast
// because of who did before. Of other devices nothing is dropped.
func forget(dev string) error {
	f, err := os.Open(dev)
	if err != nil {
		return err
	}
	return errors.Join(unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0), f.Close())
}

func command(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// fill copies files from below from to below to, chosen at random, until budget is used up.
func fill(ctx context.Context, to, from string, budget int64, seed uint64) (files int, bytes int64, err error) {
	all, err := measure.FilesBelow(from)
	if err != nil {
		return 0, 0, err
	}
	for _, s := range measure.ChooseFiles(all, budget, seed) {
		if err := ctx.Err(); err != nil {
			return files, bytes, err
		}
		if err := copyFile(filepath.Join(to, s.Path), filepath.Join(from, s.Path)); err != nil {
			return files, bytes, err
		}
		files, bytes = files+1, bytes+s.Size
	}
	if bytes < budget/2 {
		return files, bytes, fmt.Errorf("the files below %s are only %d MiB: give another directory or a smaller size", from, bytes>>20)
	}
	return files, bytes, nil
}

func copyFile(to, from string) (err error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
