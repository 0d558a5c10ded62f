package agent

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLowPriorityIsOfTheThreadAlone(t *testing.T) {
	get := func() (nice int, io uintptr) {
		n, err := unix.Getpriority(unix.PRIO_PROCESS, 0) // 20-nice, see getpriority(2)
		if err != nil {
			t.Error(err)
		}
		io, _, _ = unix.Syscall(unix.SYS_IOPRIO_GET, ioprioWhoProcess, 0, 0)
		return 20 - n, io
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		lowPriority()
		if nice, io := get(); nice != 19 || io != ioprioClassIdle {
			t.Errorf("nice %d, I/O priority %#x", nice, io)
		}
	}()
	<-done
	if nice, io := get(); nice == 19 || io == ioprioClassIdle {
		t.Errorf("another thread has nice %d, I/O priority %#x", nice, io)
	}
}
