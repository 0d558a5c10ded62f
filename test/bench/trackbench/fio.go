package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// blockSize of a write in bytes.
const blockSize = 4096

// load is what fio does to a device.
type load struct {
	Depth  int    `json:"depth"`
	Engine string `json:"engine"`
}

func (l load) String() string { return fmt.Sprintf("depth %d (%s)", l.Depth, l.Engine) }

// args begin fio's command line. The sequence of offsets depends on the seed alone, so runs of equally
// many writes write the same. All zeroes is what zram stores fastest, and no other device looks at it.
func (l load) args(dev string, seed uint64) []string {
	return []string{"--name=x", "--filename=" + dev, "--rw=randwrite", fmt.Sprintf("--bs=%d", blockSize), "--direct=1",
		"--ioengine=" + l.Engine, fmt.Sprintf("--iodepth=%d", l.Depth), fmt.Sprintf("--randseed=%d", seed), "--norandommap", "--zero_buffers",
		"--output-format=json"}
}

// run is what one run of fio took.
type run struct {
	writes  int64
	iops    float64
	fio     time.Duration // processor time of fio
	machine measure.CPUTime
	wall    time.Duration
}

// perWrite is microseconds per write.
func (r run) perWrite(d time.Duration) float64 {
	return float64(d) / float64(time.Microsecond) / float64(max(r.writes, 1))
}

// others is the share of the machine that was used by neither fio nor kernel threads, 0 to 1.
func (r run) others(cpus int) float64 {
	return max(0, float64(r.machine.Busy-r.machine.Kernel-r.fio)/float64(r.wall)/float64(cpus))
}

func runFio(ctx context.Context, args []string) (run, error) {
	cmd := exec.CommandContext(ctx, "fio", args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	before, err := measure.ReadCPU()
	if err != nil {
		return run{}, err
	}
	begin := time.Now()
	if err := cmd.Run(); err != nil {
		return run{}, fmt.Errorf("fio %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	wall := time.Since(begin)
	after, err := measure.ReadCPU()
	if err != nil {
		return run{}, err
	}
	r, err := parseFio(out.Bytes())
	r.fio = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	r.machine, r.wall = after.Sub(before), wall
	return r, err
}

// parseFio reads fio's JSON.
func parseFio(out []byte) (run, error) {
	// fio prints notes before the JSON.
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	var doc struct {
		Jobs []struct {
			Error int `json:"error"`
			Write struct {
				IOPS  float64 `json:"iops"`
				Total int64   `json:"total_ios"`
			} `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return run{}, fmt.Errorf("fio's output: %w", err)
	}
	if len(doc.Jobs) != 1 {
		return run{}, fmt.Errorf("fio reports %d jobs", len(doc.Jobs))
	}
	j := doc.Jobs[0]
	if j.Error != 0 {
		return run{}, fmt.Errorf("fio reports error %d", j.Error)
	}
	if j.Write.Total <= 0 || j.Write.IOPS <= 0 {
		return run{}, errors.New("fio wrote nothing")
	}
	return run{writes: j.Write.Total, iops: j.Write.IOPS}, nil
}

// forTime writes for some seconds.
func (l load) forTime(ctx context.Context, dev string, seed uint64, seconds int) (run, error) {
	return runFio(ctx, append(l.args(dev, seed), "--time_based", fmt.Sprintf("--runtime=%d", seconds)))
}

// count writes n times.
func (l load) count(ctx context.Context, dev string, seed uint64, n int64) (run, error) {
	r, err := runFio(ctx, append(l.args(dev, seed), fmt.Sprintf("--io_size=%d", n*blockSize)))
	if err == nil && r.writes != n {
		err = fmt.Errorf("fio wrote %d times, not %d", r.writes, n)
	}
	return r, err
}
