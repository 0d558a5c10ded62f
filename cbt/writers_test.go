package cbt_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// fastEnv lets fio write as fast as it can, until it has issued so many random writes.
const fastEnv = "TIDEMARK_TRUTH_WRITES"

// tally is what was issued. Every number is fio's or blkdiscard's own.
type tally struct {
	writes, trims, zeroes uint64
	bytes                 uint64 // of writes
}

func (a *tally) add(b tally) {
	a.writes += b.writes
	a.trims += b.trims
	a.zeroes += b.zeroes
	a.bytes += b.bytes
}

// writers writes to the target in every way it knows until stop is called, which
// returns how much that was.
func writers(t *testing.T, d target) (stop func() tally) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	// fio's rate is that of the smallest blocks: of large ones, fewer are issued.
	slower, pause := 1, 50*time.Millisecond
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		// Emulated, writers and reader would starve each other.
		slower, pause = 4, 300*time.Millisecond
	}
	rate := func(n int) string { return "--rate_iops=" + strconv.Itoa(n/slower) }
	trims, large := rate(800), "256k"
	if os.Getenv(fastEnv) != "" {
		// Many small writes tell more than few large ones; discards stay rare, for what
		// they empty can't differ.
		rate, large = func(int) string { return "--rate_iops=0" }, "32k"
	}
	size, err := deviceSize(d.disk)
	if err != nil {
		t.Fatal(err)
	}
	dev, part1, part2, sector := d.disk, d.parts[0], d.parts[1], d.sector
	args := []string{"--output-format=json"}
	for _, job := range [][]string{
		{"--name=direct", "--filename=" + dev, "--rw=randwrite", "--bsrange=4k-" + large, "--blockalign=4k", "--direct=1", "--ioengine=libaio", "--iodepth=8", rate(600)},
		{"--name=sectors", "--filename=" + dev, "--rw=randwrite", "--bs=" + sector, "--direct=1", "--ioengine=psync", "--offset=50%", "--size=30%", rate(500)},
		{"--name=buffered", "--filename=" + part2, "--rw=randwrite", "--bsrange=" + sector + "-64k", "--blockalign=" + sector, "--ioengine=psync", "--fsync=32", rate(500)},
		{"--name=uring", "--filename=" + part1, "--rw=randwrite", "--bs=16k", "--direct=1", "--ioengine=io_uring", "--iodepth=4", rate(500)},
		{"--name=fua", "--filename=" + dev, "--rw=randwrite", "--bs=4k", "--direct=1", "--sync=dsync", "--ioengine=psync", rate(100)},
		{"--name=trim", "--filename=" + dev, "--rw=randtrim", "--bsrange=4k-256k", "--blockalign=4k", "--direct=1", "--ioengine=psync", trims},
	} {
		args = append(args, job...)
		args = append(args, "--time_based", "--runtime=7200", "--norandommap", "--randrepeat=0", "--randseed="+strconv.FormatUint(rand.Uint64()>>1, 10))
	}
	// SIGTERM and not SIGKILL: fio then ends its jobs and reports.
	c := exec.CommandContext(ctx, "fio", args...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 60 * time.Second
	var wg sync.WaitGroup
	var mu sync.Mutex
	var total tally
	wg.Add(1)
	go func() {
		defer wg.Done()
		out, runErr := c.CombinedOutput()
		n, idle, err := fioReport(strings.NewReader(string(out)))
		mu.Lock()
		defer mu.Unlock()
		total.add(n)
		// Not every kind of device takes discards.
		if idle = slices.DeleteFunc(idle, func(job string) bool { return job == "trim" }); err != nil || len(idle) > 0 {
			t.Errorf("fio: %v, %v, jobs that wrote nothing: %v: %s", runErr, err, idle, out)
		}
	}()
	wg.Add(1)
	go func() {
		defer wg.Done()
		for ctx.Err() == nil {
			off := rand.Int64N(size/4096-64) * 4096
			c := exec.Command("blkdiscard", "-z", "-o", strconv.FormatInt(off, 10), "-l", strconv.Itoa(4096*(1+rand.IntN(63))), dev)
			if out, err := c.CombinedOutput(); err != nil {
				t.Errorf("write zeroes: %v: %s", err, out)
				return
			}
			mu.Lock()
			total.zeroes++
			mu.Unlock()
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}()
	return func() tally { cancel(); wg.Wait(); return total }
}

func deviceSize(dev string) (int64, error) {
	f, err := os.Open(dev)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	return f.Seek(0, io.SeekEnd)
}

// fioReport reads the last report of fio's JSON output, which messages may precede,
// and the names of jobs that did nothing.
func fioReport(r io.Reader) (n tally, idle []string, err error) {
	type ios struct {
		N     uint64 `json:"total_ios"`
		Bytes uint64 `json:"io_bytes"`
	}
	var text strings.Builder
	in := bufio.NewScanner(r)
	in.Buffer(nil, 1<<20)
	for ended := false; in.Scan() && !ended; ended = in.Text() == "}" {
		if in.Text() == "{" {
			text.Reset()
		}
		text.WriteString(in.Text())
	}
	if err := in.Err(); err != nil {
		return n, nil, err
	}
	var report struct {
		Jobs []struct {
			Jobname     string
			Write, Trim ios
		}
	}
	if err := json.Unmarshal([]byte(text.String()), &report); err != nil {
		return n, nil, fmt.Errorf("fio's report: %w", err)
	}
	for _, j := range report.Jobs {
		n.writes += j.Write.N
		n.bytes += j.Write.Bytes
		n.trims += j.Trim.N
		if j.Write.N+j.Trim.N == 0 {
			idle = append(idle, j.Jobname)
		}
	}
	return n, idle, nil
}

func TestFioReport(t *testing.T) {
	n, idle, err := fioReport(strings.NewReader(`fio: terminating on signal 15
{
  "fio version" : "fio-3.33",
  "jobs" : [
    { "jobname" : "a", "write" : { "io_bytes" : 8192, "total_ios" : 2 }, "trim" : { "total_ios" : 0 } },
    { "jobname" : "b", "write" : { "io_bytes" : 512, "total_ios" : 1 }, "trim" : { "total_ios" : 7 } },
    { "jobname" : "c", "write" : { "io_bytes" : 0, "total_ios" : 0 }, "trim" : { "total_ios" : 0 } }
  ]
}
and a word more
`))
	if want := (tally{writes: 3, trims: 7, bytes: 8704}); err != nil || n != want || len(idle) != 1 || idle[0] != "c" {
		t.Errorf("got %+v, idle %v, %v; want %+v", n, idle, err, want)
	}
	if _, _, err := fioReport(strings.NewReader("fio: no such device\n")); err == nil {
		t.Error("no report is no error")
	}
}
