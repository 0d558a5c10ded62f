package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// restic reads the device from its standard input: given as a path, it would store
// the device node. It can't do without encryption.
func (b *bench) restic(ctx context.Context, t *tool) error {
	const file = "disk.raw"
	common := measure.Process{
		Path: "restic", Args: []string{"-r", t.repo, "--cache-dir", filepath.Join(b.dir, "restic-cache")},
		Env: []string{"RESTIC_PASSWORD=benchmark"},
	}
	call := func(args ...string) measure.Process {
		p := common
		p.Args = append(append([]string(nil), common.Args...), args...)
		return p
	}
	v, err := measure.Process{Path: "restic", Args: []string{"version"}}.Run(ctx)
	if err != nil {
		return err
	}
	t.Version = strings.TrimSpace(string(v.Out))
	if _, err := call("init", "--repository-version", "2").Run(ctx); err != nil {
		return err
	}
	backup := call("backup", "--stdin", "--stdin-filename", file, "--compression", "auto", "--quiet")
	t.Command = backup.String() + " < " + b.dev
	t.run = func(ctx context.Context, _ int) (used, error) {
		f, err := os.Open(b.dev)
		if err != nil {
			return used{}, err
		}
		defer func() { _ = f.Close() }()
		p := backup
		p.Stdin = f
		v, err := p.Run(ctx)
		d := used{Done: v}
		if err != nil {
			return d, err
		}
		// The process shares the file's position.
		d.read, err = f.Seek(0, io.SeekCurrent)
		return d, err
	}
	t.verify = func(ctx context.Context) error { return b.sameStream(ctx, call("dump", "latest", file)) }
	return nil
}

// borgChunker is borg's default, content-defined.
const borgChunker = "buzhash,19,23,21,4095"

func (b *bench) borg(ctx context.Context, t *tool, chunker string) error {
	env := []string{
		"BORG_BASE_DIR=" + filepath.Join(b.dir, t.Name+"-base"), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes",
		"BORG_RELOCATED_REPO_ACCESS_IS_OK=yes",
	}
	call := func(args ...string) measure.Process { return measure.Process{Path: "borg", Args: args, Env: env} }
	v, err := call("--version").Run(ctx)
	if err != nil {
		return err
	}
	t.Version = strings.TrimSpace(string(v.Out))
	if _, err := call("init", "--encryption", "none", t.repo).Run(ctx); err != nil {
		return err
	}
	newest := ""
	backup := func(name string) measure.Process {
		return call("create", "--read-special", "--compression", "zstd,3", "--chunker-params", chunker, "--json", t.repo+"::"+name, b.dev)
	}
	t.Command = backup("NAME").String()
	t.run = func(ctx context.Context, n int) (used, error) {
		newest = fmt.Sprintf("n%d", n)
		v, err := backup(newest).Run(ctx)
		d := used{Done: v}
		if err != nil {
			return d, err
		}
		d.read, err = parseBorg(d.Out)
		return d, err
	}
	t.verify = func(ctx context.Context) error {
		return b.sameStream(ctx, call("extract", "--stdout", t.repo+"::"+newest))
	}
	return nil
}

// parseBorg returns the bytes that an archive holds, which is what borg has read.
func parseBorg(out []byte) (int64, error) {
	var r struct {
		Archive struct {
			Stats struct {
				Original int64 `json:"original_size"`
			} `json:"stats"`
		} `json:"archive"`
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return 0, fmt.Errorf("borg's output: %w", err)
	}
	if r.Archive.Stats.Original <= 0 {
		return 0, errors.New("borg has read nothing")
	}
	return r.Archive.Stats.Original, nil
}

// sameStream compares what a process prints with the device.
func (b *bench) sameStream(ctx context.Context, p measure.Process) error {
	cmd := exec.CommandContext(ctx, p.Path, p.Args...)
	cmd.Env = append(os.Environ(), p.Env...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	differs := measure.Same(b.dev, out)
	// It ends when it finds no reader, if not by itself.
	_ = out.Close()
	if ended := cmd.Wait(); differs != nil || ended != nil {
		return fmt.Errorf("%s: %w: %s", p, errors.Join(differs, ended), measure.Tail(errs.String()))
	}
	return nil
}
