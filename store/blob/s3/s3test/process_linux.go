package s3test

import (
	"os/exec"
	"runtime"
	"syscall"
)

func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}

// startAndWait keeps the thread that starts the process until its end: the kernel
// takes the end of that thread for the parent's.
func startAndWait(cmd *exec.Cmd, started, exited chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := cmd.Start()
	started <- err
	if err == nil {
		exited <- cmd.Wait()
		close(exited)
	}
}
