package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

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
	run func(ctx context.Context, n int) (done, error)
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

// done is a process that has ended well.
type done struct {
	out       []byte
	wall, cpu time.Duration
	read      int64 // bytes of the device, as far as can be told
}

// process is a program as it is started.
type process struct {
	path  string
	args  []string
	env   []string
	stdin *os.File
}

func (p process) run(ctx context.Context) (done, error) {
	cmd := exec.CommandContext(ctx, p.path, p.args...)
	cmd.Env = append(os.Environ(), p.env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if p.stdin != nil {
		cmd.Stdin = p.stdin // a file is handed on as it is, not copied
	}
	begin := time.Now()
	err := cmd.Run()
	d := done{out: out.Bytes(), wall: time.Since(begin)}
	if err != nil {
		return d, fmt.Errorf("%s: %w: %s", p, err, tail(errs.String()+out.String()))
	}
	d.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return d, nil
}

func (p process) String() string {
	s := filepath.Base(p.path) + " " + strings.Join(p.args, " ")
	if p.stdin != nil {
		s += " < " + p.stdin.Name()
	}
	return s
}

func tail(s string) string {
	s = strings.TrimSpace(s)
	return s[max(0, len(s)-2000):]
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
	before, err := sizeOf(t.repo)
	if err != nil {
		return backup{}, err
	}
	d, err := t.run(ctx, n)
	if err != nil {
		return backup{}, err
	}
	after, err := sizeOf(t.repo)
	return backup{d.wall.Seconds(), d.cpu.Seconds(), d.read, after - before}, err
}

// sizeOf is the size of all files below dir.
func sizeOf(dir string) (int64, error) {
	var n int64
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	return n, err
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
