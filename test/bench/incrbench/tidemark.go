package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/test/bench/measure"
)

// tidemark sets t up as one of our two ways. Each has its own repository and its own tracker:
// a device's changes are kept for one repository, and taking them from one must not take them
// from the other.
func (b *bench) tidemark(ctx context.Context, t *tool, binary string) error {
	pins := filepath.Join(filepath.Dir(bpf.DefaultDir), fmt.Sprintf("tidemark-bench-%d-%s", os.Getpid(), t.Name))
	call := func(args ...string) measure.Process {
		return measure.Process{Path: binary, Args: append(args, "-r", t.repo, "--pin-dir", pins)}
	}
	v, err := measure.Process{Path: binary, Args: []string{"version"}}.Run(ctx)
	if err != nil {
		return err
	}
	t.Version = strings.TrimSpace(string(v.Out))
	if _, err := call("init").Run(ctx); err != nil {
		return err
	}
	t.close = func() error { return bpf.Remove(pins) }
	backup := call("backup", "vm", "--disk", b.dev, "--json")
	t.Command = backup.String()
	if t.Name == "compare" {
		t.prepare = func(ctx context.Context, n int) error {
			if n == 0 {
				return nil // there is no tracker yet
			}
			_, err := call("untrack", b.dev).Run(ctx)
			return err
		}
	}
	t.run = func(ctx context.Context, n int) (used, error) {
		v, err := backup.Run(ctx)
		d := used{Done: v}
		if err != nil {
			return d, err
		}
		want := t.Name
		if n == 0 {
			want = "full"
		}
		d.read, err = parsePoint(d.Out, want)
		return d, err
	}
	t.verifyEach = true
	t.verify = func(ctx context.Context) (err error) {
		file := filepath.Join(b.dir, "restored.raw")
		defer func() { err = errors.Join(err, os.RemoveAll(file)) }()
		if _, err := call("restore", "vm@latest", "-o", file).Run(ctx); err != nil {
			return err
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		return measure.Same(b.dev, f)
	}
	return nil
}

// parsePoint returns the bytes that a backup read. It is an error if the backup was made in another
// way than it should have been.
func parsePoint(out []byte, want string) (int64, error) {
	var r struct {
		Point struct {
			Disks []struct {
				Tracking struct {
					Mode    string   `json:"mode"`
					Reasons []string `json:"reasons"`
				} `json:"tracking"`
				Stats struct {
					Read int64 `json:"read"`
				} `json:"stats"`
			} `json:"disks"`
		} `json:"point"`
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return 0, fmt.Errorf("tidemark's output: %w", err)
	}
	if len(r.Point.Disks) != 1 {
		return 0, fmt.Errorf("tidemark's point has %d disks", len(r.Point.Disks))
	}
	d := r.Point.Disks[0]
	if d.Tracking.Mode != want {
		return 0, fmt.Errorf("tidemark made a %q, not a %q: %s", d.Tracking.Mode, want, strings.Join(d.Tracking.Reasons, "; "))
	}
	return d.Stats.Read, nil
}
