// Command trackbench measures what tracking costs the writer: fio's random writes of
// 4 KiB on the same device without a tracker, with one that does not track this device, and
// with one that does; and, where there is device-mapper, with dm-era and dm-snapshot
// in the tracker's place. It prints tables and never fails for being slow.
//
//	go run ./test/bench/trackbench [-rounds 9] [-seconds 3] [-devices loop,zram] [-json]
//
// It needs root and fio. In every round each layer gets one run, one right after the other, the
// order changing from round to round; all runs on a device write the same blocks. See
// docs/benchmarks.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/test/bench/measure"
)

// bench is one run of this program.
type bench struct {
	rounds, statRounds, seconds int
	seed                        uint64
	pins                        string
	layers                      []layer
	host                        measure.Host
	noted                       map[string]bool
	notes                       []string
}

// note keeps what whoever reads the numbers has to know.
func (b *bench) note(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	if !b.noted[s] {
		b.noted[s] = true
		b.notes = append(b.notes, s)
		fmt.Fprintln(os.Stderr, "NOTE:", s)
	}
}

func main() { measure.Main("trackbench", trackbench) }

func trackbench(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("trackbench", flag.ContinueOnError)
	b := &bench{noted: map[string]bool{}}
	fs.IntVar(&b.rounds, "rounds", 9, "rounds; below 7 the intervals mean little")
	fs.IntVar(&b.statRounds, "stat-rounds", 3, "further rounds with the kernel's BPF statistics on")
	fs.IntVar(&b.seconds, "seconds", 3, "length of the warm-up, which decides how many writes each run does")
	fs.Uint64Var(&b.seed, "seed", 1, "fio's random seed")
	devices := fs.String("devices", "loop,zram", "devices to make: loop, zram")
	var scratch []string
	fs.Func("scratch", "`PATH[:SIDE]` of disks to destroy, SIDE for what dm-era and dm-snapshot keep; repeatable; needs -destroy", func(s string) error {
		scratch = append(scratch, s)
		return nil
	})
	destroy := fs.Bool("destroy", os.Getenv("TIDEMARK_TESTVM") != "", "the disks of -scratch may be destroyed (default in a test VM)")
	size := fs.Int64("size", 512, "size of the devices made, in MiB")
	dir := fs.String("dir", "/dev/shm", "where the loop devices' files lie")
	names := fs.String("layers", "none,attached,tracked", "layers to compare; besides: linear, era, snapshot")
	depths := fs.String("depths", "1:psync,32:libaio", "DEPTH:ENGINE of fio, ...")
	busy := fs.Bool("busy", false, "measure although the machine has other work")
	asJSON := fs.Bool("json", false, "print all samples as JSON")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if b.rounds < 1 || b.seconds < 1 || b.statRounds < 0 || *size < 16 {
		return errors.New("rounds and seconds must be at least 1, size 16")
	}
	if b.layers, err = chooseLayers(*names); err != nil {
		return err
	}
	loads, err := parseLoads(*depths)
	if err != nil {
		return err
	}
	if len(scratch) > 0 && !*destroy {
		return errors.New("-scratch destroys disks: say -destroy if that is what you want")
	}
	if os.Geteuid() != 0 {
		return bpf.ErrPermission
	}
	if b.host, err = measure.ThisHost(); err != nil {
		return err
	}
	if err := b.host.Quiet(*busy, os.Stderr); err != nil {
		return err
	}
	n, err := strangers()
	if err != nil {
		return err
	}
	if n > 0 {
		b.note("%d programs of another tracker are attached: \"none\" is not free of tracking (tidemark untrack --all)", n)
	}
	b.pins = filepath.Join(filepath.Dir(bpf.DefaultDir), fmt.Sprintf("tidemark-bench-%d", os.Getpid()))

	withSide := false
	for _, l := range b.layers {
		withSide = withSide || l.side
	}
	var cells []*cell
	for spec := range strings.SplitSeq(*devices+","+strings.Join(scratch, ","), ",") {
		if spec == "" {
			continue
		}
		d, err := openDevice(ctx, spec, *dir, *size<<20, withSide)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.Close()) }()
		for _, l := range loads {
			cells = append(cells, &cell{Device: d.name, Bytes: d.bytes, Load: l, dev: d})
		}
	}
	if err := b.measure(ctx, cells); err != nil {
		return err
	}
	return b.report(os.Stdout, cells, *asJSON)
}

func parseLoads(s string) ([]load, error) {
	var out []load
	for one := range strings.SplitSeq(s, ",") {
		var l load
		if _, err := fmt.Sscanf(one, "%d:%s", &l.Depth, &l.Engine); err != nil || l.Depth < 1 {
			return nil, fmt.Errorf("-depths: %q is no DEPTH:ENGINE", one)
		}
		out = append(out, l)
	}
	return out, nil
}
