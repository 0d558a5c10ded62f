package measure

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of /proc's times: USER_HZ, 100 on every architecture that
// Tidemark runs on (Linux, Documentation/filesystems/proc.rst).
const tick = time.Second / 100

// CPUTime is processor time since boot. Its resolution is 10 ms.
type CPUTime struct {
	Busy   time.Duration // of all processors, neither idle nor waiting for I/O nor stolen
	Stolen time.Duration // taken by the hypervisor
	Kernel time.Duration // of the kernel's own threads that live now, part of Busy
}

// Sub is the time between two.
func (c CPUTime) Sub(before CPUTime) CPUTime {
	return CPUTime{c.Busy - before.Busy, c.Stolen - before.Stolen, max(c.Kernel-before.Kernel, 0)}
}

// ReadCPU reads the processor time so far. A kernel thread that ends between two
// readings takes its time with it.
func ReadCPU() (CPUTime, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return CPUTime{}, err
	}
	c, err := parseStat(string(b))
	if err != nil {
		return CPUTime{}, err
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return CPUTime{}, err
	}
	for _, f := range stats {
		b, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return CPUTime{}, err
		}
		parent, used, err := parseTask(string(b))
		if err != nil {
			return CPUTime{}, fmt.Errorf("%s: %w", f, err)
		}
		if parent == kthreadd {
			c.Kernel += used
		}
	}
	return c, nil
}

const kthreadd = 2 // the parent of all kernel threads

// parseStat reads the first line of /proc/stat: user nice system idle iowait irq softirq
// steal guest guest_nice; guest time is in user time already.
func parseStat(stat string) (CPUTime, error) {
	line, _, _ := strings.Cut(stat, "\n")
	f := strings.Fields(line)
	if len(f) < 9 || f[0] != "cpu" {
		return CPUTime{}, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var v [8]time.Duration
	for i := range v {
		n, err := strconv.ParseInt(f[i+1], 10, 64)
		if err != nil {
			return CPUTime{}, fmt.Errorf("/proc/stat: %w", err)
		}
		v[i] = time.Duration(n) * tick
	}
	return CPUTime{Busy: v[0] + v[1] + v[2] + v[5] + v[6], Stolen: v[7]}, nil
}

// parseTask reads the parent and the processor time of a /proc/PID/stat. The name in
// it may hold spaces and parentheses.
func parseTask(stat string) (parent int, used time.Duration, err error) {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 13 {
		return 0, 0, fmt.Errorf("too short: %q", stat)
	}
	if parent, err = strconv.Atoi(f[1]); err != nil {
		return 0, 0, err
	}
	for _, s := range f[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, 0, err
		}
		used += time.Duration(n) * tick
	}
	return parent, used, nil
}
