// Command repobench compares repositories: Tidemark's, borg's and restic's, of the same disk image full of
// real files. In turns, everyone makes a full backup into a new repository, restores it to a file, and
// answers random reads of 4 KiB from its mounted backup. It prints a table and never fails for being slow; that
// one of our restores or reads is wrong is an error.
//
//	go build -o bin/tidemark ./cmd/tidemark
//	go run ./test/bench/repobench -tidemark bin/tidemark -dir DIR [-size 4096] [-rounds 3] [-json]
//
// It needs root, mkfs.ext4 and fusermount3, and restic and borg if they are to be measured. See docs/benchmarks.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// bench is one run of this program.
type bench struct {
	rounds int
	size   int64 // bytes of the disk
	seed   uint64
	from   []string
	window time.Duration // of random reads, per tool and round
	host   measure.Host

	dir    string // all that is made lies here
	image  string
	filled string // what is in it, for people
	tools  []*tool
	copied measure.Sample // seconds of cp
}

func main() { measure.Main("repobench", repobench) }

func repobench(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("repobench", flag.ContinueOnError)
	b := &bench{}
	dir := fs.String("dir", os.TempDir(), "where the image and the repositories lie: several times the size")
	mib := fs.Int64("size", 4096, "size of the disk in MiB")
	fs.IntVar(&b.rounds, "rounds", 3, "turns of every tool; below 7 the intervals mean little")
	fs.Uint64Var(&b.seed, "seed", 1, "of the files chosen and of the places read")
	from := fs.String("from", "", "directories whose files fill the disk, with commas; empty: /usr and the sources of Go modules")
	fs.DurationVar(&b.window, "reads", 10*time.Second, "how long to read at random, per tool and round")
	binary := fs.String("tidemark", "bin/tidemark", "the program to measure")
	names := fs.String("tools", "tidemark,borg,restic", "what to measure, tidemark first")
	busy := fs.Bool("busy", false, "measure although the machine has other work")
	asJSON := fs.Bool("json", false, "print all samples as JSON")
	if err := fs.Parse(args); err != nil {
		return err
	}
	b.size = *mib << 20
	if b.rounds < 1 || b.size < 64<<20 || b.window <= 0 {
		return errors.New("rounds must be at least 1, size 64, reads above 0")
	}
	if !strings.HasPrefix(*names+",", "tidemark,") {
		return errors.New("the first tool must be tidemark: the others are compared with it")
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
	if b.from, err = sources(ctx, *from); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(*dir, "tidemark-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if err := b.makeImage(ctx); err != nil {
		return err
	}
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
	if err := b.measure(ctx); err != nil {
		return err
	}
	return b.report(os.Stdout, *asJSON)
}

func (b *bench) say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
