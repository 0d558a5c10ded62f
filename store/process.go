package store

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process says who wrote a document, so that another one on the same host can tell
// that it is gone. It is never what safety rests on.
type process struct {
	Host      string `json:"host"`
	Boot      string `json:"boot,omitempty"`          // of the kernel: random, new with each start
	Namespace string `json:"pid_namespace,omitempty"` // in which PID counts
	PID       int    `json:"pid"`
	Start     uint64 `json:"pid_start,omitempty"` // in clock ticks since the boot: PIDs come back
}

func thisProcess() process {
	host, _ := os.Hostname() // for people
	pid := os.Getpid()
	start, _ := processStart(pid)
	return process{Host: host, Boot: bootID(), Namespace: pidNamespace(), PID: pid, Start: start}
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func pidNamespace() string {
	s, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return ""
	}
	return s
}

// processStart reads field 22 of /proc/PID/stat (proc_pid_stat(5)). The name in
// field 2 may hold anything.
func processStart(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 20 {
		return 0, errors.New("/proc/PID/stat is too short")
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// isGone tells whether p is proven to have ended: it ran under this very kernel,
// and its PID is free or another's. False means that nothing is known.
func (p process) isGone() bool {
	if p.Boot == "" || p.Namespace == "" || p.PID <= 0 || p.Boot != bootID() || p.Namespace != pidNamespace() {
		return false
	}
	if errors.Is(unix.Kill(p.PID, 0), unix.ESRCH) {
		return true
	}
	start, err := processStart(p.PID)
	return err == nil && p.Start != 0 && start != p.Start
}
