// Command vmtest runs programs, mostly static Go test binaries, inside a
// throw-away Debian kernel.
//
//	CGO_ENABLED=0 go test -c -o /tmp/x.test ./some/package
//	vmtest [flags] /tmp/x.test -test.v [-- OTHER [ARGS...]]...
//
// It exits with the status of the first program that failed, 124 if time ran
// out, 125 if the guest ended without a result (a kernel panic), and 2 if
// something else went wrong.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	testvm "github.com/tidemark/tidemark/test/vm"
)

const (
	exitFailure  = 2
	exitTimeout  = 124
	exitNoResult = 125
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status, err := vmtest(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "vmtest:", err)
	}
	os.Exit(status)
}

func vmtest(ctx context.Context, args []string) (int, error) {
	fs := flag.NewFlagSet("vmtest", flag.ContinueOnError)
	fs.Usage = func() {
		_, _ = fmt.Fprint(fs.Output(), "usage: vmtest [flags] PROGRAM [ARGS...] [-- PROGRAM [ARGS...]]...\n\n")
		fs.PrintDefaults()
	}
	var src testvm.KernelSource
	fs.StringVar(&src.Package, "kernel", testvm.CloudKernel, "Debian `package` of the kernel")
	fs.StringVar(&src.Suite, "suite", "bookworm", "Debian `suite` to take it from")
	fs.StringVar(&src.Mirror, "mirror", "", "`URL` of the Debian mirror (default: the host's own)")
	modules := testvm.DefaultModules()
	fs.Func("modules", "comma-separated `list` of modules to load, \"NAME PARAM=VALUE ...\" each (default \""+strings.Join(modules, ",")+"\")",
		func(s string) error {
			modules = strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
			return nil
		})
	var tools []string
	fs.Func("tool", "host `program` to add with its libraries; repeatable", func(s string) error {
		tools = append(tools, s)
		return nil
	})
	var disks []testvm.ScratchDisk
	fs.Func("disk", "`[BUS:]MiB` of a scratch disk on bus virtio, scsi or nvme; repeatable", func(s string) error {
		bus, size, ok := strings.Cut(s, ":")
		if !ok {
			bus, size = testvm.Virtio, s
		}
		mib, err := strconv.ParseInt(size, 10, 32)
		if err != nil || mib <= 0 {
			return errors.New("not a size in MiB")
		}
		disks = append(disks, testvm.ScratchDisk{Bus: bus, Size: mib << 20})
		return nil
	})
	memory := fs.Int("memory", 1024, "guest memory in `MiB`")
	cpus := fs.Int("cpus", 2, "number of guest `processors`")
	accel := fs.String("accel", "", "`accelerator`, kvm or tcg (default: kvm if it works)")
	limit := fs.Duration("timeout", 5*time.Minute, "how long the guest may take")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0, err
		}
		return exitFailure, nil // already told, with the usage
	}
	var programs []testvm.Program
	for rest := fs.Args(); len(rest) > 0; {
		one := rest
		if i := slices.Index(rest, "--"); i >= 0 {
			one, rest = rest[:i], rest[i+1:]
		} else {
			rest = nil
		}
		if len(one) > 0 {
			programs = append(programs, testvm.Program{Path: one[0], Args: one[1:]})
		}
	}
	if len(programs) == 0 {
		fs.Usage()
		return exitFailure, nil
	}

	kernel, err := testvm.FetchKernel(ctx, src)
	if err != nil {
		return exitFailure, err
	}
	if *accel == "" {
		if *accel, err = testvm.Accel(ctx, kernel); err != nil {
			return exitFailure, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, *limit) // the guest's time, not the download's
	defer cancel()
	res, err := testvm.RunInKernel(ctx, testvm.Run{
		Kernel: kernel, Programs: programs, Modules: modules, Tools: tools, Disks: disks,
		Accel: *accel, MemoryMiB: *memory, CPUs: *cpus, Console: os.Stdout,
	})
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return exitTimeout, err
	case errors.Is(err, testvm.ErrNoResult):
		return exitNoResult, err
	case err != nil:
		return exitFailure, err
	}
	return res.Exit(), nil
}
