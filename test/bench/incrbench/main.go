// Command incrbench compares what an incremental backup costs: Tidemark with tracking,
// Tidemark comparing the whole disk, restic and borg. They back up the same
// block device, full of real files, and after each change of one percent once more, in turns.
// Every point of Tidemark is restored and compared with the device, and the last one of each other
// tool too. It prints a table and never fails for being slow.
//
//	go build -o bin/tidemark ./cmd/tidemark
//	go run ./test/bench/incrbench -tidemark bin/tidemark -dir DIR [-size 4096] [-rounds 5] [-json]
//
// It needs root, loop devices, mkfs.ext4, and restic and borg if they are to be
// measured. See docs/benchmarks.md.
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
	size    int64 // bytes of the disk
	percent float64
	seed    uint64
	from    string
	cached  bool
	host    measure.Host

	where string // the directory that was given
	dir   string // all that is made lies here, below it
	dev   string
	tools []*tool
}

func main() { measure.Main("incrbench", incrbench) }

func incrbench(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("incrbench", flag.ContinueOnError)
	b := &bench{}
	dir := fs.String("dir", os.TempDir(), "where the disk and the repositories lie: several times the size")
	mib := fs.Int64("size", 4096, "size of the disk in MiB")
	fs.IntVar(&b.rounds, "rounds", 5, "changes, each followed by an incremental of every tool; below 7 the intervals mean little")
	fs.Float64Var(&b.percent, "change", 1, "percent of the disk to change in each round")
	fs.Uint64Var(&b.seed, "seed", 1, "of what is changed")
	fs.StringVar(&b.from, "from", "/usr", "directory whose files fill the disk")
	fs.BoolVar(&b.cached, "cached", false, "have the disk's file in the page cache: reading all of it costs no input then")
	binary := fs.String("tidemark", "bin/tidemark", "the program to measure")
	names := fs.String("tools", "tracked,compare,restic,borg,borg-fixed", "what to measure, tracked first")
	busy := fs.Bool("busy", false, "measure although the machine has other work")
	asJSON := fs.Bool("json", false, "print all samples as JSON")
	if err := fs.Parse(args); err != nil {
		return err
	}
	b.size, b.where = *mib<<20, *dir
	if b.rounds < 1 || b.size < 64<<20 || b.percent <= 0 || b.percent > 100 {
		return errors.New("rounds must be at least 1, size 64, change above 0 and at most 100")
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
	dev, detach, err := b.makeDisk(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, detach()) }()
	b.dev = dev

	for name := range strings.SplitSeq(*names, ",") {
		t, err := b.newTool(ctx, name, *binary)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if t.close != nil {
			defer func() { err = errors.Join(err, t.close()) }()
		}
		b.tools = append(b.tools, t)
	}
	if b.tools[0].Name != "tracked" {
		return errors.New("the first tool must be tracked: the others are compared with it")
	}
	if err := b.measure(ctx); err != nil {
		return err
	}
	return b.report(os.Stdout, *asJSON)
}

func (b *bench) say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
