package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func (b *bench) measure(ctx context.Context) error {
	for round := range b.rounds {
		for _, k := range measure.Turns(len(b.tools), round) {
			if err := b.back(ctx, b.tools[k]); err != nil {
				return fmt.Errorf("%s: full backup: %w", b.tools[k].Name, err)
			}
			b.say("round %d of %d: full: %s took %.1f s", round+1, b.rounds, b.tools[k].Name, last(b.tools[k].Backup.Seconds))
		}
		for _, k := range measure.Turns(len(b.tools)+1, round) {
			if k == len(b.tools) {
				if err := b.copy(ctx); err != nil {
					return err
				}
				b.say("round %d of %d: cp took %.1f s", round+1, b.rounds, last(b.copied))
				continue
			}
			if err := b.give(ctx, b.tools[k], round); err != nil {
				return fmt.Errorf("%s: restore: %w", b.tools[k].Name, err)
			}
			b.say("round %d of %d: restore: %s took %.1f s", round+1, b.rounds, b.tools[k].Name, last(b.tools[k].Restore.Seconds))
		}
		for _, k := range measure.Turns(len(b.tools), round) {
			t := b.tools[k]
			if err := t.problem(ctx, b.random(ctx, t, round)); err != nil {
				return err
			}
			b.say("round %d of %d: %s did %.0f reads a second", round+1, b.rounds, t.Name, last(t.Reads.PerSecond))
		}
	}
	for _, t := range b.tools[1:] {
		own := b.tools[0]
		t.Backup.Ratio = ratio(own.Backup.Seconds, t.Backup.Seconds)
		t.Restore.Ratio = ratio(own.Restore.Seconds, t.Restore.Seconds)
		t.Reads.Ratio = ratio(own.Reads.PerSecond, t.Reads.PerSecond)
	}
	return nil
}

func ratio(a, b measure.Sample) *measure.Interval {
	r := measure.Ratio(a, b)
	return &r
}

func last(s measure.Sample) float64 {
	if len(s) == 0 {
		return 0
	}
	return s[len(s)-1]
}

func (c *costs) add(d measure.Done, more time.Duration) {
	c.Seconds = append(c.Seconds, (d.Wall + more).Seconds())
	c.CPUSeconds = append(c.CPUSeconds, d.CPU.Seconds())
}

func (b *bench) back(ctx context.Context, t *tool) error {
	if err := t.wipe(ctx); err != nil {
		return err
	}
	if err := measure.Forget(b.image); err != nil {
		return err
	}
	d, err := t.backup.Run(ctx)
	if err != nil {
		return err
	}
	t.Backup.add(d, 0)
	t.Stored, err = measure.SizeOf(t.repo)
	return err
}

// give restores to a file and waits until that is on the disk.
func (b *bench) give(ctx context.Context, t *tool, round int) (err error) {
	to := filepath.Join(b.dir, "restored")
	defer func() { err = errors.Join(err, os.RemoveAll(to)) }()
	if err := errors.Join(os.Mkdir(to, 0o755), measure.Forget(t.repo)); err != nil {
		return err
	}
	d, err := t.restore(to).Run(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(to, t.restored)
	more, err := flush(file)
	if err != nil {
		return err
	}
	t.Restore.add(d, more)
	if t.Name != "tidemark" && round < b.rounds-1 {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	err = measure.Same(b.image, f)
	t.Identical = err == nil
	return t.problem(ctx, err)
}

// copy is what restoring would cost if nothing had to be done.
func (b *bench) copy(ctx context.Context) (err error) {
	to := filepath.Join(b.dir, "copy")
	defer func() { err = errors.Join(err, os.RemoveAll(to)) }()
	if err := measure.Forget(b.image); err != nil {
		return err
	}
	d, err := measure.Process{Path: "cp", Args: []string{"--reflink=never", b.image, to}}.Run(ctx)
	if err != nil {
		return err
	}
	more, err := flush(to)
	b.copied = append(b.copied, (d.Wall + more).Seconds())
	return err
}

// flush waits until a file is on the disk, so that nobody is fast for having left that to others.
func flush(file string) (time.Duration, error) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	err = f.Sync()
	return time.Since(begin), errors.Join(err, f.Close())
}
