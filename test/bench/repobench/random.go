package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/test/bench/measure"
)

const block = 4096

// random mounts the tool's backup and reads single blocks at places that are the same for all tools of a
// round, as many as there is time for.
func (b *bench) random(ctx context.Context, t *tool, round int) (err error) {
	unmount, err := b.mountTool(ctx, t)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	if err := measure.Forget(t.repo); err != nil {
		return err
	}
	file, err := waitFor(ctx, filepath.Join(b.mnt(t), t.mounted))
	if err != nil {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil || st.Size() != b.size {
		return errors.Join(err, fmt.Errorf("%s has %d bytes, the image has %d", file, st.Size(), b.size))
	}
	rnd := rand.New(rand.NewPCG(b.seed, uint64(round)))
	var took measure.Sample
	got := map[int64][]byte{}
	for begin := time.Now(); time.Since(begin) < b.window && ctx.Err() == nil; {
		off := rnd.Int64N(b.size/block) * block
		p := make([]byte, block)
		one := time.Now()
		if _, err := f.ReadAt(p, off); err != nil {
			return err
		}
		took = append(took, float64(time.Since(one).Nanoseconds())/1e3)
		if len(got) < maxChecked {
			got[off] = p
		}
	}
	var sum float64
	for _, us := range took {
		sum += us
	}
	t.Reads.PerSecond = append(t.Reads.PerSecond, float64(len(took))/sum*1e6)
	t.Reads.MedianUS = append(t.Reads.MedianUS, took.Median())
	return errors.Join(ctx.Err(), b.right(got))
}

// maxChecked bounds the reads that are compared with the image afterwards.
const maxChecked = 20000

func (b *bench) right(got map[int64][]byte) error {
	f, err := os.Open(b.image)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	want := make([]byte, block)
	for off, p := range got {
		if _, err := f.ReadAt(want, off); err != nil {
			return err
		}
		if !bytes.Equal(p, want) {
			return fmt.Errorf("a random read at %d: %w", off, measure.ErrDiffers)
		}
	}
	return nil
}

func (b *bench) mountTool(ctx context.Context, t *tool) (unmount func() error, err error) {
	mnt := b.mnt(t)
	if err := os.MkdirAll(mnt, 0o755); err != nil {
		return nil, err
	}
	end := func() error {
		_, err := measure.Process{Path: "fusermount3", Args: []string{"-u", mnt}}.Run(context.WithoutCancel(ctx))
		return err
	}
	if !t.foreground {
		_, err = t.mount.Run(ctx)
		return end, err
	}
	cmd := exec.CommandContext(ctx, t.mount.Path, t.mount.Args...)
	cmd.Env, cmd.Dir = append(os.Environ(), t.mount.Env...), t.mount.Dir
	var errs strings.Builder
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return func() error {
		if err := end(); err != nil {
			return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
		}
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("%s: %w: %s", t.mount, err, measure.Tail(errs.String()))
		}
		return nil
	}, nil
}

// waitFor waits for a file to appear.
func waitFor(ctx context.Context, file string) (string, error) {
	for end := time.Now().Add(2 * time.Minute); ; {
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
		if time.Now().After(end) {
			return "", fmt.Errorf("%s did not appear", file)
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
