package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// sources are the directories whose files fill the disk.
func sources(ctx context.Context, given string) ([]string, error) {
	if given != "" {
		return strings.Split(given, ","), nil
	}
	v, err := measure.Process{Path: "go", Args: []string{"env", "GOMODCACHE"}}.Run(ctx)
	if err != nil {
		return nil, fmt.Errorf("where Go's modules are, or give -from: %w", err)
	}
	return []string{"/usr", strings.TrimSpace(string(v.Out))}, nil
}

// makeImage makes an ext4 file system in a file, with files chosen at random until it is full.
// Nothing is mounted.
func (b *bench) makeImage(ctx context.Context) (err error) {
	b.image = filepath.Join(b.dir, "disk.raw")
	stage := filepath.Join(b.dir, "stage")
	defer func() { err = errors.Join(err, os.RemoveAll(stage)) }()
	var all []measure.File
	for _, dir := range b.from {
		files, err := measure.FilesBelow(dir)
		if err != nil {
			return err
		}
		for _, f := range files {
			all = append(all, measure.File{Path: filepath.Join(dir, f.Path), Size: f.Size})
		}
	}
	// What the file system needs for itself: inodes and the journal.
	chosen := measure.ChooseFiles(all, b.size*9/10, b.seed)
	var bytes int64
	for _, f := range chosen {
		to := filepath.Join(stage, f.Path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), ctx.Err()); err != nil {
			return err
		}
		if err := link(to, f.Path); err != nil {
			return err
		}
		bytes += f.Size
	}
	if bytes < b.size/2 {
		return fmt.Errorf("the files below %s are only %d MiB: give other directories or a smaller size", strings.Join(b.from, " and "), bytes>>20)
	}
	f, err := os.Create(b.image)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(b.size), f.Close()); err != nil {
		return err
	}
	mkfs := measure.Process{Path: "mkfs.ext4", Args: []string{"-q", "-F", "-m", "0", "-i", "8192", "-d", stage, b.image}}
	if _, err := mkfs.Run(ctx); err != nil {
		return err
	}
	b.filled = fmt.Sprintf("%d files, %d MiB, from %s", len(chosen), bytes>>20, strings.Join(b.from, " and "))
	b.say("the disk holds %s", b.filled)
	return nil
}

// link makes a hard link, or a copy where there can be none.
func link(to, from string) error {
	err := os.Link(from, to)
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EMLINK) {
		var p []byte
		if p, err = os.ReadFile(from); err == nil {
			err = os.WriteFile(to, p, 0o644)
		}
	}
	return err
}
