package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/test/bench/measure"
)

// fill makes the raw disk: files of a directory, chosen at random, one after the other.
func (b *bench) fill(from string) (err error) {
	all, err := measure.FilesBelow(from)
	if err != nil {
		return err
	}
	f, err := os.Create(b.raw)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var n int64
	files := 0
	for _, c := range measure.ChooseFiles(all, b.size*5/4, b.seed) {
		if n == b.size {
			break
		}
		one, err := os.Open(filepath.Join(from, c.Path))
		if err != nil {
			return err
		}
		m, err := io.Copy(f, io.LimitReader(one, b.size-n))
		if err := errors.Join(err, one.Close()); err != nil {
			return err
		}
		n += m
		files++
	}
	if n < b.size {
		return fmt.Errorf("the files below %s are only %d MiB: give another directory or a smaller size", from, n>>20)
	}
	b.filled = fmt.Sprintf("%d files from %s", files, from)
	return nil
}

// keep makes the point and the qcow2.
func (b *bench) keep(ctx context.Context, binary string) (repo string, err error) {
	repo = filepath.Join(b.store, "repo")
	pins := filepath.Join(filepath.Dir(bpf.DefaultDir), fmt.Sprintf("tidemark-bench-%d", os.Getpid()))
	defer func() { err = errors.Join(err, bpf.Remove(pins)) }()
	b.qcow2 = filepath.Join(b.store, "disk.qcow2")
	for _, p := range []measure.Process{
		{Path: binary, Args: []string{"init", "-r", repo}},
		{Path: binary, Args: []string{"backup", "vm", "--disk", b.raw, "-r", repo, "--pin-dir", pins}},
		{Path: "qemu-img", Args: []string{"convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", b.raw, b.qcow2}},
	} {
		if _, err := p.Run(ctx); err != nil {
			return "", err
		}
	}
	return repo, nil
}
