package measure

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Host is what a result has to be read with.
type Host struct {
	Time    time.Time `json:"time"`
	Kernel  string    `json:"kernel"`
	CPU     string    `json:"cpu"`
	CPUs    int       `json:"cpus"`
	Memory  int64     `json:"memory"` // bytes
	Load    float64   `json:"load"`   // of the last minute, when asked
	Use     float64   `json:"use"`    // share of all processors that was in use when asked
	Busy    bool      `json:"busy"`   // Load or Use was above MaxLoad or MaxUse
	Command []string  `json:"command"`
}

// A machine is not quiet if its one-minute load per processor is above MaxLoad, or
// if more than MaxUse of its processors is in use. The load alone won't do: it
// remembers the compiler that made this program, and forgets what has just begun.
const (
	MaxLoad = 0.75
	MaxUse  = 0.1
)

const useTime = 2 * time.Second

// ErrBusy is wrapped when the machine has other work to do.
var ErrBusy = errors.New("the machine is not quiet")

// ThisHost asks the kernel what this machine is and how busy it is, for which it
// stands still for two seconds.
func ThisHost() (Host, error) {
	h := Host{Time: time.Now(), CPUs: runtime.NumCPU(), Command: os.Args}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return h, fmt.Errorf("uname: %w", err)
	}
	h.Kernel = unix.ByteSliceToString(u.Release[:])
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return h, err
	}
	h.CPU = cpuModel(string(cpu))
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return h, fmt.Errorf("sysinfo: %w", err)
	}
	h.Memory = int64(si.Totalram) * int64(si.Unit)
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return h, err
	}
	if h.Load, err = parseLoad(string(load)); err != nil {
		return h, err
	}
	before, err := ReadCPU()
	if err != nil {
		return h, err
	}
	begin := time.Now()
	time.Sleep(useTime)
	after, err := ReadCPU()
	if err != nil {
		return h, err
	}
	h.Use = float64(after.Busy-before.Busy) / float64(time.Since(begin)) / float64(h.CPUs)
	h.Busy = h.Load > MaxLoad*float64(h.CPUs) || h.Use > MaxUse
	return h, nil
}

// Quiet is an error that wraps ErrBusy if the machine is not quiet; with anyway it is
// a warning on w instead.
func (h Host) Quiet(anyway bool, w io.Writer) error {
	if !h.Busy {
		return nil
	}
	err := fmt.Errorf("%w: load %.2f on %d processors, %.0f %% of them in use; at most %.2f each and %.0f %%",
		ErrBusy, h.Load, h.CPUs, 100*h.Use, MaxLoad, 100*MaxUse)
	if !anyway {
		return fmt.Errorf("%w: wait, or measure anyway with -busy", err)
	}
	_, _ = fmt.Fprintf(w, "WARNING: %v. DON'T BELIEVE THESE NUMBERS.\n", err)
	return nil
}

func (h Host) String() string {
	s := fmt.Sprintf("%s, Linux %s, %s, %d processors, %.1f GiB; at the start load %.2f, %.0f %% in use",
		h.Time.Format(time.RFC3339), h.Kernel, h.CPU, h.CPUs, float64(h.Memory)/(1<<30), h.Load, 100*h.Use)
	if h.Busy {
		s += " (NOT QUIET: don't believe these numbers)"
	}
	return s
}

func cpuModel(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown processor"
}

func parseLoad(loadavg string) (float64, error) {
	first, _, _ := strings.Cut(loadavg, " ")
	v, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return 0, fmt.Errorf("/proc/loadavg: %w", err)
	}
	return v, nil
}
