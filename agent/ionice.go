package agent

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// IOPriority is a class and level as ioprio_set(2) takes them. I/O schedulers that know priorities (BFQ, mq-deadline)
// obey it, others ignore it.
type IOPriority int

const (
	ioprioClassShift = 13
	ioprioBestEffort = 2 << ioprioClassShift
)

// ParseIOPriority reads idle, best-effort, or best-effort:N with N from 0, first, to 7, last.
func ParseIOPriority(s string) (IOPriority, error) {
	class, level, given := strings.Cut(s, ":")
	n := 4 // the kernel's default
	var err error
	if given {
		n, err = strconv.Atoi(level)
	}
	switch {
	case class == "idle" && !given:
		return ioprioClassIdle, nil
	case class == "best-effort" && err == nil && n >= 0 && n <= 7:
		return IOPriority(ioprioBestEffort | n), nil
	}
	return 0, fmt.Errorf("I/O priority %q: must be idle, best-effort or best-effort:0 to best-effort:7", s)
}

// Apply gives the priority to all threads of this process. Threads that begin later have it from
// those that start them.
func (p IOPriority) Apply() error {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range tasks {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		_, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, uintptr(tid), uintptr(p))
		if errno != 0 && !errors.Is(errno, unix.ESRCH) {
			return fmt.Errorf("set I/O priority: %w", errno)
		}
	}
	return nil
}
