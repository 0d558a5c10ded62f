// Command mountbench compares reads from a mounted point with the same bytes in a plain file, in
// nbdfuse on nbdkit, and in the FUSE export of qemu-storage-daemon. In turns, everyone is read from end to
// end and at random, with nothing in the page cache and with all of it. It prints a table and
// never fails for being slow.
//
//	go build -o bin/tidemark ./cmd/tidemark
//	go run ./test/bench/mountbench -tidemark bin/tidemark [-dir DIR] [-size 2048] [-rounds 3] [-busy] [-json]
//
// What is not installed is left out.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/test/bench/measure"
)

// The quantities that are measured, in the order of the table.
var quantities = []string{"sequential cold MB/s", "sequential warm MB/s", "random cold IOPS", "random cold, 4 readers, IOPS", "random warm IOPS"}

type bench struct {
	dir    string
	size   int64 // bytes
	window time.Duration
	binary string
	host   measure.Host
}

func main() { measure.Main("mountbench", run) }

func run(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("mountbench", flag.ContinueOnError)
	b := bench{}
	dir := fs.String("dir", os.TempDir(), "where disk and repository lie: twice the size")
	mib := fs.Int64("size", 2048, "size of the disk in MiB")
	rounds := fs.Int("rounds", 3, "turns of everyone; below 7 the intervals mean little")
	fs.DurationVar(&b.window, "reads", 2*time.Second, "length of a measurement of random reads")
	fs.StringVar(&b.binary, "tidemark", "bin/tidemark", "the program to measure")
	busy := fs.Bool("busy", false, "measure although the machine has other work")
	asJSON := fs.Bool("json", false, "print all samples as JSON")
	if err := fs.Parse(args); err != nil {
		return err
	}
	b.size = *mib << 20
	if *rounds < 1 || b.size < 16<<20 || b.window <= 0 {
		return errors.New("rounds must be at least 1, size 16, reads above 0")
	}
	if b.host, err = measure.ThisHost(); err != nil {
		return err
	}
	if err := b.host.Quiet(*busy, os.Stderr); err != nil {
		return err
	}
	if b.binary, err = filepath.Abs(b.binary); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(*dir, "tidemark-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	layers := b.layers()
	for round := range *rounds {
		for _, i := range measure.Turns(len(layers), round) {
			fmt.Fprintf(os.Stderr, "round %d: %s\n", round+1, layers[i].Name)
			if err := b.turn(ctx, layers[i], uint64(round)); err != nil {
				return fmt.Errorf("%s: %w", layers[i].Name, err)
			}
		}
	}
	return b.report(os.Stdout, layers, *rounds, *asJSON)
}

func (b *bench) plain() string { return filepath.Join(b.dir, "disk.raw") }
func (b *bench) repo() string  { return filepath.Join(b.dir, "repo") }

// prepare makes the disk, half of whose blocks of 4 KiB can't be compressed, and its point.
func (b *bench) prepare(ctx context.Context) error {
	f, err := os.Create(b.plain())
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	src := rand.NewChaCha8([32]byte{1})
	block := make([]byte, 4096)
	for i := range b.size / int64(len(block)) {
		if i%2 == 0 {
			_, _ = src.Read(block) // never fails
		} else {
			copy(block, strings.Repeat(fmt.Sprintf("block %d of a disk\n", i), 256))
		}
		if _, err := w.Write(block); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	if err := errors.Join(w.Flush(), f.Sync(), f.Close()); err != nil {
		return err
	}
	pins := filepath.Join("/sys/fs/bpf", filepath.Base(b.dir)) // the host's own tracking is not touched
	for _, args := range [][]string{{"init"}, {"backup", "bench", "--disk", b.plain()}} {
		if _, err := (measure.Process{Path: b.binary, Args: append(args, "-r", b.repo(), "--pin-dir", pins)}).Run(ctx); err != nil {
			return errors.Join(err, bpf.Remove(pins))
		}
	}
	return bpf.Remove(pins)
}

// layer is one way to get at the disk.
type layer struct {
	Name    string                    `json:"name"`
	Samples map[string]measure.Sample `json:"samples"`

	args []string // of its process; none: the plain file
	file string   // to be read
	mnt  string   // to be unmounted
}

func (b *bench) layers() []*layer {
	mnt := func(name string) string { return filepath.Join(b.dir, "mnt-"+name) }
	all := []*layer{
		{Name: "tidemark", args: []string{b.binary, "mount", mnt("tidemark"), "-r", b.repo()}, mnt: mnt("tidemark"), file: mnt("tidemark") + "/bench/latest/disk0.raw"},
		{Name: "plain file", file: b.plain()},
		{Name: "nbdfuse", args: []string{"nbdfuse", "-r", mnt("nbdfuse"), "[", "nbdkit", "-r", "file", b.plain(), "]"}, mnt: mnt("nbdfuse"), file: mnt("nbdfuse") + "/nbd"},
		{Name: "qemu-storage-daemon", args: []string{"qemu-storage-daemon", "--blockdev", "driver=file,node-name=d,read-only=on,filename=" + b.plain(),
			"--export", "type=fuse,id=e,node-name=d,mountpoint=" + mnt("qemu")}, mnt: mnt("qemu"), file: mnt("qemu")},
	}
	var there []*layer
	for _, l := range all {
		l.Samples = map[string]measure.Sample{}
		if len(l.args) > 0 {
			if _, err := exec.LookPath(l.args[0]); err != nil {
				fmt.Fprintf(os.Stderr, "left out: %v\n", err)
				continue
			}
		}
		there = append(there, l)
	}
	return there
}

// start brings the layer up, with nothing cached.
func (b *bench) start(ctx context.Context, l *layer) (f *os.File, stop func() error, err error) {
	stop = func() error { return nil }
	if len(l.args) > 0 {
		if l.mnt == l.file { // mounted over a file
			err = os.WriteFile(l.mnt, nil, 0o600)
		} else {
			err = os.MkdirAll(l.mnt, 0o755)
		}
		if err != nil {
			return nil, nil, err
		}
		cmd := exec.CommandContext(ctx, l.args[0], l.args[1:]...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return nil, nil, err
		}
		stop = func() error {
			var err error
			if l.mnt == l.file { // qemu-storage-daemon unmounts by itself
				err = cmd.Process.Signal(unix.SIGTERM)
			} else {
				_, err = measure.Process{Path: "fusermount3", Args: []string{"-u", l.mnt}}.Run(context.WithoutCancel(ctx))
			}
			if werr := cmd.Wait(); werr != nil && !isExit(werr) {
				err = errors.Join(err, werr)
			}
			return err
		}
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if st, err := os.Stat(l.file); err == nil && st.Size() == b.size {
			break
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return nil, nil, errors.Join(fmt.Errorf("%s did not appear", l.file), ctx.Err(), stop())
		}
	}
	if f, err = os.Open(l.file); err != nil {
		return nil, nil, errors.Join(err, stop())
	}
	end := stop
	return f, func() error { return errors.Join(f.Close(), end()) }, b.forget(f)
}

func isExit(err error) bool {
	var e *exec.ExitError
	return errors.As(err, &e)
}

// forget drops f, the disk and the repository from the page cache.
func (b *bench) forget(f *os.File) error {
	drop := func(f *os.File) error { return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }
	if err := drop(f); err != nil {
		return err
	}
	files, err := measure.FilesBelow(b.repo())
	if err != nil {
		return err
	}
	paths := []string{b.plain()}
	for _, x := range files {
		paths = append(paths, filepath.Join(b.repo(), x.Path))
	}
	for _, p := range paths {
		g, err := os.Open(p)
		if err != nil {
			return err
		}
		if err := errors.Join(drop(g), g.Close()); err != nil {
			return err
		}
	}
	return nil
}

// turn measures everything once.
func (b *bench) turn(ctx context.Context, l *layer, seed uint64) error {
	add := func(i int, v float64, err error) error {
		l.Samples[quantities[i]] = append(l.Samples[quantities[i]], v)
		return err
	}
	f, stop, err := b.start(ctx, l)
	if err != nil {
		return err
	}
	for i := range 2 {
		v, err := b.sequential(ctx, f)
		if err := add(i, v, err); err != nil {
			return errors.Join(err, stop())
		}
	}
	v, err := b.random(ctx, f, 1, seed)
	if err := errors.Join(add(4, v, err), stop()); err != nil {
		return err
	}
	for i, readers := range []int{1, 4} {
		f, stop, err := b.start(ctx, l)
		if err != nil {
			return err
		}
		v, err := b.random(ctx, f, readers, seed)
		if err := errors.Join(add(2+i, v, err), stop()); err != nil {
			return err
		}
	}
	return nil
}

// sequential reads all of f and returns MB/s.
func (b *bench) sequential(ctx context.Context, f *os.File) (float64, error) {
	p := make([]byte, 1<<20)
	begin := time.Now()
	for off := int64(0); off < b.size && ctx.Err() == nil; off += int64(len(p)) {
		if _, err := f.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
	}
	return float64(b.size) / 1e6 / time.Since(begin).Seconds(), ctx.Err()
}

// random reads 4 KiB at places that are the same for everyone in a round, and returns reads per second.
func (b *bench) random(ctx context.Context, f *os.File, readers int, seed uint64) (float64, error) {
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return 0, err
	}
	type result struct {
		n   int
		err error
	}
	results := make(chan result)
	begin := time.Now()
	for r := range readers {
		go func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(r)))
			p := make([]byte, 4096)
			var n int
			var err error
			for time.Since(begin) < b.window && ctx.Err() == nil && err == nil {
				_, err = f.ReadAt(p, rnd.Int64N(b.size/4096)*4096)
				n++
			}
			results <- result{n, err}
		}()
	}
	total, err := 0, ctx.Err()
	for range readers {
		r := <-results
		total += r.n
		err = errors.Join(err, r.err)
	}
	return float64(total) / time.Since(begin).Seconds(), err
}

func (b *bench) report(w io.Writer, layers []*layer, rounds int, asJSON bool) error {
	if asJSON {
		return measure.WriteJSON(w, struct {
			Host   measure.Host `json:"host"`
			Size   int64        `json:"size"`
			Layers []*layer     `json:"layers"`
		}{b.host, b.size, layers})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(t, "%s\n%d MiB; medians of %d rounds\n", b.host, b.size>>20, rounds)
	for _, q := range quantities {
		_, _ = fmt.Fprintf(t, "\n%s\tmedian (min–max)\ttidemark is [95 %%]\n", q)
		for i, l := range layers {
			s, against := l.Samples[q], ""
			if i > 0 {
				against = measure.Ratio(layers[0].Samples[q], s).String()
			}
			_, _ = fmt.Fprintf(t, "%s\t%.0f (%.0f–%.0f)\t%s\n", l.Name, s.Median(), s.Min(), s.Max(), against)
		}
	}
	return t.Flush()
}
