package mainjob

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// point is what the job needs of a restore point's document.
type point struct {
	ID          string    `json:"id"`
	Time        time.Time `json:"time"`
	Consistency string    `json:"consistency"`
	Quiesce     struct {
		Method string        `json:"method"`
		Rounds int           `json:"rounds"`
		Paused time.Duration `json:"paused_ns"`
	} `json:"quiesce"`
	Disks []struct {
		Tracking struct {
			Mode    string   `json:"mode"`
			Reasons []string `json:"reasons"`
		} `json:"tracking"`
		Stats struct {
			Changed int64 `json:"changed"`
			Read    int64 `json:"read"`
			Stored  int64 `json:"stored"`
		} `json:"stats"`
	} `json:"disks"`
}

// tidemark runs the binary and returns what it printed.
func (j *job) tidemark(ctx context.Context, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, j.Binary, args...)
	c.Env = append(c.Environ(), "TIDEMARK_REPO="+j.repo)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("tidemark %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.Bytes(), nil
}

func (j *job) tidemarkJSON(ctx context.Context, into any, args ...string) error {
	out, err := j.tidemark(ctx, append(args, "--json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("tidemark %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// export serves a point until the returned function is called.
func (j *job) export(ctx context.Context, ref, socket, overlay string) (stop func() error, err error) {
	c := exec.CommandContext(ctx, j.Binary, "export", ref, "--socket", socket, "--writable", "--overlay", overlay)
	c.Env = append(c.Environ(), "TIDEMARK_REPO="+j.repo)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	// The line says that it listens.
	if n, err := out.Read(make([]byte, 256)); n == 0 {
		return nil, errors.Join(fmt.Errorf("tidemark export %s: %w: %s", ref, err, errs.Bytes()), c.Wait())
	}
	return func() error {
		_ = c.Process.Signal(syscall.SIGTERM)
		if err := c.Wait(); err != nil && c.ProcessState.ExitCode() != 130 {
			return fmt.Errorf("tidemark export %s: %w: %s", ref, err, errs.Bytes())
		}
		return nil
	}, nil
}
