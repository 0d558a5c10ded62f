package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
)

// GuardCommand is the hidden subcommand that runs RunGuard.
const GuardCommand = "__guard"

// guardRelease tells a guard that its machine may outlive the program that started it.
const guardRelease = 'r'

// RunGuard runs QEMU until that ends, and returns its status for the process to
// exit with. args are the machine's folder, QEMU's program and its arguments. If descriptor 3 (a
// pipe held by the program that started the machine) ends without a release, QEMU is killed:
// its disks are served by that program, and what it had accepted and not yet made durable is gone.
//
// If the guard itself is killed, the kernel kills QEMU.
func RunGuard(args []string) (status int, err error) {
	if len(args) < 2 {
		return 2, errors.New("guard: a folder and a program are needed")
	}
	dir := args[0]
	hold := os.NewFile(3, "hold")
	syscall.CloseOnExec(3)
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// They are for the program that started the machine, which ends it in order.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	// The death signal comes when the thread that started the child ends.
	runtime.LockOSThread()
	cmd := exec.Command(args[1], args[2:]...) //nolint:noctx // it ends by the pipe
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 1, fmt.Errorf("guard: %w", err)
	}
	go func() {
		sign := make([]byte, 1)
		for {
			n, err := hold.Read(sign)
			if n == 1 && sign[0] == guardRelease {
				return
			}
			if err != nil {
				_ = cmd.Process.Kill()
				return
			}
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if s, ok := exit.Sys().(syscall.WaitStatus); ok && s.Signaled() {
			return 128 + int(s.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}
