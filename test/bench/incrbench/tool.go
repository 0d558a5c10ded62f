package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// tool is one way to back up the device. Samples have one value per incremental.
type tool struct {
	Name       string         `json:"name"`
	Version    string         `json:"version"`
	Command    string         `json:"command"` // of an incremental
	Full       backup         `json:"full"`
	Seconds    measure.Sample `json:"seconds"`
	CPUSeconds measure.Sample `json:"cpu_seconds"`
	Read       measure.Sample `json:"read"`     // bytes of the device that it looked at
	Stored     measure.Sample `json:"stored"`   // bytes by which its repository grew
	Verified   int            `json:"verified"` // backups restored and found equal to the device

	// Problem is why the last backup could not be restored, or what was wrong with it.
	Problem string `json:"problem,omitempty"`

	// Against tracked; nil for tracked itself.
	Ratio *measure.Interval `json:"ratio,omitempty"`

	repo string
	// prepare does what is not part of a backup.
	prepare func(ctx context.Context, n int) error
	// run makes a backup; n counts them. Full is the first one, n = 0.
	run func(ctx context.Context, n int) (used, error)
	// verify compares the newest backup with the device.
	verify     func(ctx context.Context) error
	verifyEach bool
	close      func() error
}

// backup is what one backup took.
type backup struct {
	Seconds    float64 `json:"seconds"`
	CPUSeconds float64 `json:"cpu_seconds"`
	Read       int64   `json:"read"`
	Stored     int64   `json:"stored"`
}

// used is what a process took that has made a backup.
type used struct {
	measure.Done
	read int64 // bytes of the device, as far as can be told
}

// back makes one backup and measures it.
func (b *bench) back(ctx context.Context, t *tool, n int) (backup, error) {
	if !b.cached {
		if err := forget(b.dev); err != nil {
			return backup{}, fmt.Errorf("forget %s: %w", b.dev, err)
		}
	}
	if t.prepare != nil {
		if err := t.prepare(ctx, n); err != nil {
			return backup{}, err
		}
	}
	before, err := measure.SizeOf(t.repo)
	if err != nil {
		return backup{}, err
	}
	d, err := t.run(ctx, n)
	if err != nil {
		return backup{}, err
	}
	after, err := measure.SizeOf(t.repo)
	return backup{d.Wall.Seconds(), d.CPU.Seconds(), d.read, after - before}, err
}

func (b *bench) newTool(ctx context.Context, name, binary string) (*tool, error) {
	t := &tool{Name: name, repo: filepath.Join(b.dir, name)}
	var err error
	switch name {
	case "tracked", "compare":
		err = b.tidemark(ctx, t, binary)
	case "restic":
		err = b.restic(ctx, t)
	case "borg":
		err = b.borg(ctx, t, borgChunker)
	case "borg-fixed":
		err = b.borg(ctx, t, "fixed,4194304") // what its manual recommends for disk images
	default:
		err = errors.New("unknown tool")
	}
	return t, err
}
