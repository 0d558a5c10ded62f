// Command matrix runs the tracker's truth tests over every kind of block device
// under many Debian kernels, one virtual machine each, and prints a table of
// kernel × kind.
//
//	matrix [flags] CBT_TEST BPF_TEST TIDEMARK
//
// The arguments are static programs: the test binaries of packages cbt and bpf, and
// tidemark. It exits with 1 if anything failed under any kernel; a kernel that apt
// does not offer any more is named in the table, and is no failure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	testvm "github.com/tidemark/tidemark/test/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := matrix(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// options are the command line.
type options struct {
	kinds   string // regular expression, all if empty
	epochs  string
	writes  string
	logs    string
	limit   time.Duration
	accel   string
	cbtTest string
	bpfTest string
	command string
}

func matrix(ctx context.Context, args []string, out, progress io.Writer) int {
	fs := flag.NewFlagSet("matrix", flag.ContinueOnError)
	fs.SetOutput(progress)
	fs.Usage = func() {
		_, _ = fmt.Fprint(fs.Output(), "usage: matrix [flags] CBT_TEST BPF_TEST TIDEMARK\n\n")
		fs.PrintDefaults()
	}
	var o options
	kernels := fs.String("kernels", strings.Join(defaultKernels, ","), "comma-separated `list` of SUITE/PACKAGE")
	kinds := fs.String("kinds", "", "comma-separated `list` of device kinds (default: all, and the other tests too)")
	fs.StringVar(&o.epochs, "epochs", "", "epochs of each round (default: the test's own)")
	fs.StringVar(&o.writes, "writes", "", "random writes per kind, as fast as fio can (default: one round at a gentle rate)")
	fs.StringVar(&o.logs, "logs", filepath.Join("bin", "matrix"), "`folder` for the consoles and the table")
	fs.DurationVar(&o.limit, "timeout", 40*time.Minute, "how long one guest may take")
	fs.StringVar(&o.accel, "accel", "", "`accelerator`, kvm or tcg (default: kvm if it works)")
	again := fs.Bool("again", false, "run nothing: print the table of the consoles that are in the folder")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	if *again {
		all, err := readLogs(o.logs)
		if err != nil {
			_, _ = fmt.Fprintln(progress, "matrix:", err)
			return 2
		}
		return report(all, o.logs, out, progress)
	}
	if fs.NArg() != 3 {
		fs.Usage()
		return 2
	}
	o.cbtTest, o.bpfTest, o.command = fs.Arg(0), fs.Arg(1), fs.Arg(2)
	o.kinds = strings.Join(strings.FieldsFunc(*kinds, isComma), "|")
	if err := os.MkdirAll(o.logs, 0o755); err != nil {
		_, _ = fmt.Fprintln(progress, "matrix:", err)
		return 2
	}

	var all []result
	for _, spec := range strings.FieldsFunc(*kernels, isComma) {
		begin := time.Now()
		r := runKernel(ctx, spec, o)
		if ctx.Err() != nil {
			_, _ = fmt.Fprintln(progress, "matrix: interrupted")
			return 130
		}
		_, _ = fmt.Fprintf(progress, "%s in %s\n", r.summary(), time.Since(begin).Round(time.Second))
		all = append(all, r)
	}
	return report(all, o.logs, out, progress)
}

// report prints the table, keeps it beside the consoles, and judges.
func report(all []result, dir string, out, progress io.Writer) int {
	table := render(all)
	_, _ = io.WriteString(out, table)
	if err := os.WriteFile(filepath.Join(dir, "table.txt"), []byte(table), 0o600); err != nil {
		_, _ = fmt.Fprintln(progress, "matrix:", err)
		return 2
	}
	for _, r := range all {
		if r.failed() {
			return 1
		}
	}
	return 0
}

func isComma(r rune) bool { return r == ',' || r == ' ' }

// runKernel boots one kernel and reads what its tests said.
func runKernel(ctx context.Context, spec string, o options) result {
	r := result{kernel: spec}
	src, err := parseKernel(spec)
	if err != nil {
		r.broken = err.Error()
		return r
	}
	k, err := testvm.FetchKernel(ctx, src)
	if err != nil {
		r.absent = lastLine(err.Error())
		return r
	}
	r.release = k.Release
	file, err := os.Create(filepath.Join(o.logs, strings.ReplaceAll(spec, "/", "-")+".log"))
	if err != nil {
		r.broken = err.Error()
		return r
	}
	defer func() { _ = file.Close() }()
	run, err := guest(ctx, k, o)
	if err != nil {
		r.broken = err.Error()
		return r
	}
	run.Console = file
	ctx, cancel := context.WithTimeout(ctx, o.limit)
	defer cancel()
	res, err := testvm.RunInKernel(ctx, run)
	lines := make([]string, len(res.Log))
	for i, l := range res.Log {
		lines[i] = l.Text
	}
	r.parse(lines)
	r.missing = res.Missing
	r.exits = res.Exits
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		r.broken = "the guest took longer than " + o.limit.String()
	case errors.Is(err, testvm.ErrNoResult):
		r.broken = "the guest ended without a result: see " + file.Name()
	case err != nil:
		r.broken = lastLine(err.Error())
	}
	return r
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}
