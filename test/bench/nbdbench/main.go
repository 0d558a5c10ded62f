// Command nbdbench compares Tidemark's NBD server with qemu-nbd and nbdkit: the same
// data, the same clients, in turns, one server at a time under load, over a unix socket. A raw file
// is served by all three; a restore point beside the same disk as a qcow2 compressed with
// zstd, and as a raw file, which shows what the store costs. It prints a table and never fails for being slow.
//
//	go build -o bin/tidemark ./cmd/tidemark
//	go run ./test/bench/nbdbench -tidemark bin/tidemark [-rounds 5] [-seconds 2] [-rows raw,point] [-json]
//
// It needs fio with its nbd engine, nbdcopy, nbdkit, qemu-nbd and qemu-img. See docs/benchmarks.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// bench is one run of this program.
type bench struct {
	rounds  int
	seconds int
	size    int64 // bytes of the disk
	seed    uint64
	only    []string // parts of the names of rows; empty: all
	host    measure.Host
	filled  string // with what, for people

	raw     string // the disk, in memory
	dir     string // what belongs to it
	store   string // where repository and qcow2 lie
	qcow2   string
	sockets int
	tables  []*table
}

func main() { measure.Main("nbdbench", nbdbench) }

func nbdbench(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("nbdbench", flag.ContinueOnError)
	b := &bench{}
	dir := fs.String("dir", "/dev/shm", "where the raw file lies: in memory, so that nobody waits for a disk")
	store := fs.String("store", os.TempDir(), "where the repository and the qcow2 lie: on a disk, so that they can be cold")
	mib := fs.Int64("size", 1024, "size of the disk in MiB")
	fs.IntVar(&b.rounds, "rounds", 5, "turns of every server; below 7 the intervals mean little")
	fs.IntVar(&b.seconds, "seconds", 2, "how long one measurement takes")
	fs.Uint64Var(&b.seed, "seed", 1, "of the files chosen and of the places read")
	from := fs.String("from", "/usr", "directory whose files fill the disk")
	binary := fs.String("tidemark", "bin/tidemark", "the program that exports the point")
	only := fs.String("rows", "", "measure only rows in whose names one of these, with commas, is")
	busy := fs.Bool("busy", false, "measure although the machine has other work")
	asJSON := fs.Bool("json", false, "print all samples as JSON")
	serve := fs.String("serve", "", "internal: serve this file")
	socket := fs.String("socket", "", "internal")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *serve != "" {
		return serveRaw(ctx, *serve, *socket)
	}
	b.size = *mib << 20
	if b.rounds < 1 || b.seconds < 1 || b.size < 2*warmBytes {
		return fmt.Errorf("rounds and seconds must be at least 1, size %d", 2*warmBytes>>20)
	}
	if *only != "" {
		b.only = strings.Split(*only, ",")
	}
	if b.host, err = measure.ThisHost(); err != nil {
		return err
	}
	if err := b.host.Quiet(*busy, os.Stderr); err != nil {
		return err
	}
	if *binary, err = filepath.Abs(*binary); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(*dir, "tidemark-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.store, err = os.MkdirTemp(*store, "tidemark-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.store)) }()
	b.raw = filepath.Join(b.dir, "disk.raw")
	if err := b.fill(*from); err != nil {
		return err
	}
	if err := b.rawTable(); err != nil {
		return err
	}
	if err := b.pointTable(ctx, *binary); err != nil {
		return err
	}
	for _, t := range b.tables {
		if err := b.measure(ctx, t); err != nil {
			return err
		}
	}
	return b.report(os.Stdout, *asJSON)
}

func (b *bench) say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// wanted tells whether a row is to be measured.
func (b *bench) wanted(name string) bool {
	for _, part := range b.only {
		if strings.Contains(name, part) {
			return true
		}
	}
	return len(b.only) == 0
}
