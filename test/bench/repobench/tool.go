package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// tool is one way to keep the image. Samples have one value per round.
type tool struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Command string `json:"command"` // of the backup

	Backup    costs `json:"backup"`
	Stored    int64 `json:"stored"` // bytes of the repository after the full backup
	Restore   costs `json:"restore"`
	Reads     reads `json:"reads"`
	Identical bool  `json:"identical"` // what was restored last is the image

	// Problem is what was wrong with a restore or read of a peer.
	Problem string `json:"problem,omitempty"`

	repo, cache string
	init        measure.Process
	backup      measure.Process
	restore     func(to string) measure.Process // into the directory to
	restored    string                          // the file in it
	mount       measure.Process
	foreground  bool   // mount doesn't return while it is mounted
	mounted     string // pattern of the file below the mount point, which is b.mnt(t)
	close       func() error
}

// costs are what an operation took.
type costs struct {
	Seconds    measure.Sample `json:"seconds"`
	CPUSeconds measure.Sample `json:"cpu_seconds"`
	// Tidemark's time in terms of this tool's; nil for Tidemark itself.
	Ratio *measure.Interval `json:"tidemark_to_this,omitempty"`
}

// reads are the random reads of a mounted backup.
type reads struct {
	PerSecond measure.Sample    `json:"per_second"`
	MedianUS  measure.Sample    `json:"median_us"` // of one read, in microseconds
	Ratio     *measure.Interval `json:"tidemark_to_this,omitempty"`
}

func (b *bench) mnt(t *tool) string { return filepath.Join(b.dir, t.Name+"-mnt") }

// wipe gives the tool a new, empty repository.
func (t *tool) wipe(ctx context.Context) error {
	if err := errors.Join(os.RemoveAll(t.repo), os.RemoveAll(t.cache)); err != nil {
		return err
	}
	if err := os.MkdirAll(t.cache, 0o700); err != nil {
		return err
	}
	_, err := t.init.Run(ctx)
	return err
}

func (b *bench) newTool(ctx context.Context, name, binary string) (*tool, error) {
	t := &tool{Name: name, repo: filepath.Join(b.dir, name), cache: filepath.Join(b.dir, name+"-cache")}
	switch name {
	case "tidemark":
		b.tidemark(t, binary)
	case "borg":
		b.borg(t)
	case "restic":
		b.restic(t)
	default:
		return nil, errors.New("unknown tool")
	}
	v := measure.Process{Path: t.init.Path, Args: []string{map[string]string{"borg": "--version"}[name]}}
	if v.Args[0] == "" {
		v.Args[0] = "version"
	}
	d, err := v.Run(ctx)
	if err != nil {
		return nil, err
	}
	t.Version, t.Command = string(firstLine(d.Out)), t.backup.String()
	return t, nil
}

func firstLine(p []byte) []byte {
	for i, c := range p {
		if c == '\n' {
			return p[:i]
		}
	}
	return p
}

// problem ends the run if it is ours. What others make wrong is told, and the numbers of all with
// it.
func (t *tool) problem(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", t.Name, err)
	if t.Name == "tidemark" || ctx.Err() != nil {
		return err
	}
	t.Problem = err.Error()
	return nil
}
