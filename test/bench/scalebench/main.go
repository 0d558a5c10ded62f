// Command scalebench shows what many points of a huge disk cost: a synthetic disk of 16
// TiB with 1,000 points, of which each changes some hundred random grains.
//
// It prints, for the first, the middle and the last point, the requests, bytes and time of
// opening it and of 4 KiB random reads; the metadata that each point and each changed
// grain costs; what garbage collection costs when every second point was forgotten; and the peak
// memory of what writes, reads and collects. With -s3 the repository lies on an S3 server
// (versitygw on this host), whose every answer takes a while. It judges nothing.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

type options struct {
	Dir      string
	Size     int64 // of the disk, in bytes
	Areas    int   // parts of the disk that hold data, of areaGrains each, spread over all of it
	Points   int
	Changes  int // grains that each point after the first changes
	Stored   int // incompressible bytes in each grain
	Reads    int // per measurement
	S3       bool
	location string // of the repository
	phase    string
	point    int
}

const (
	grain = 64 << 10
	// An area fills one node of the map's second level: 64 leaves of 64 grains.
	areaGrains = 64 * 64
	vm         = "scale"
)

func main() {
	var o options
	tib := flag.Int64("tib", 16, "size of the disk, in TiB")
	flag.StringVar(&o.Dir, "dir", "", "folder for the repository (default: a temporary one)")
	flag.IntVar(&o.Areas, "areas", 128, "areas of 256 MiB that hold data, spread over the disk")
	flag.IntVar(&o.Points, "points", 1000, "points")
	flag.IntVar(&o.Changes, "changes", 300, "random grains that each point changes")
	flag.IntVar(&o.Stored, "stored", 512, "incompressible bytes in each grain; the rest are zeroes")
	flag.IntVar(&o.Reads, "reads", 2000, "random reads per measurement")
	flag.BoolVar(&o.S3, "s3", false, "keep the repository on an S3 server that keeps its objects in -dir")
	flag.StringVar(&o.location, "location", "", "internal: the repository")
	flag.StringVar(&o.phase, "phase", "", "internal: what this process is to do")
	flag.IntVar(&o.point, "point", 0, "internal: which point")
	flag.Parse()
	o.Size = *tib << 40
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "scalebench:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch o.phase {
	case "full", "incremental":
		r, err := writePoints(ctx, o)
		return report(r, err)
	case "read":
		r, err := readPoint(ctx, o)
		return report(r, err)
	case "forget":
		r, err := forgetHalf(ctx, o)
		return report(r, err)
	case "gc":
		r, err := collect(ctx, o)
		return report(r, err)
	}
	if o.Dir == "" {
		dir, err := os.MkdirTemp("", "scalebench-")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(dir) }()
		o.Dir = dir
	}
	o.location = o.Dir
	if o.S3 {
		stop, err := o.serve(ctx)
		if err != nil {
			return err
		}
		defer stop()
	}
	return bench(ctx, o)
}

// serve starts an S3 server, for this process and the phases that it starts.
func (o *options) serve(ctx context.Context) (stop func(), err error) {
	program, err := s3test.Find()
	if err != nil {
		return nil, err
	}
	for name, value := range s3test.Env() {
		if err := os.Setenv(name, value); err != nil {
			return nil, err
		}
	}
	srv, stop, err := s3test.Run(ctx, program, o.Dir)
	if err != nil {
		return nil, err
	}
	o.location = "s3:" + srv.Endpoint + "/" + s3test.Bucket + "/scale"
	return stop, nil
}

// report hands a phase's result to the process that started it.
func report(r any, err error) error {
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// used is what a phase took of the machine.
type used struct {
	peak int64 // resident memory, in bytes
	wall time.Duration
	cpu  time.Duration
}

// runPhase runs a part of the bench in a process of its own, so that its memory is its own.
func (o options) runPhase(ctx context.Context, name string, point int, result any) (used, error) {
	self, err := os.Executable()
	if err != nil {
		return used{}, err
	}
	arg := func(name string, n any) string { return fmt.Sprintf("-%s=%v", name, n) }
	cmd := exec.CommandContext(ctx, self, arg("phase", name), arg("point", point), arg("dir", o.Dir), arg("location", o.location), arg("tib", o.Size>>40), arg("areas", o.Areas),
		arg("points", o.Points), arg("changes", o.Changes), arg("stored", o.Stored), arg("reads", o.Reads))
	return measure(cmd, result)
}

// measure runs cmd and reads its result, if there is to be one.
func measure(cmd *exec.Cmd, result any) (used, error) {
	cmd.Stderr = os.Stderr
	begin := time.Now()
	out, err := cmd.Output()
	if err != nil {
		return used{}, fmt.Errorf("%v: %w", cmd.Args, err)
	}
	u := used{wall: time.Since(begin), cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		u.peak = ru.Maxrss << 10
	}
	if result == nil {
		return u, nil
	}
	return u, json.Unmarshal(out, result)
}
