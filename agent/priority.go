package agent

import "golang.org/x/sys/unix"

// From include/uapi/linux/ioprio.h.
const (
	ioprioWhoProcess = 1
	ioprioClassIdle  = 3 << 13
)

// lowPriority makes the calling thread give way to all others, on the processor and, where the
// disk's I/O scheduler knows priorities (BFQ, mq-deadline), on the disk. Best effort.
// The goroutine must be locked to the thread and not unlock it again.
func lowPriority() {
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 19) // the thread alone, see setpriority(2)
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, 0, ioprioClassIdle)
}
