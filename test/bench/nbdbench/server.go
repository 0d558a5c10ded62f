package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/test/bench/measure"
)

// server is one of those compared.
type server struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Command string `json:"command"`

	args   []string
	socket string
	cold   []string // files that must not be in the page cache when it is cold
	cmd    *exec.Cmd
	errs   bytes.Buffer
}

func (s *server) uri() string { return "nbd+unix:///?socket=" + s.socket }

// start starts it and waits until it listens.
func (s *server) start(ctx context.Context) error {
	s.cmd = exec.CommandContext(ctx, s.args[0], s.args[1:]...)
	s.errs.Reset()
	s.cmd.Stderr = &s.errs
	if err := s.cmd.Start(); err != nil {
		return err
	}
	for range 500 {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", s.socket)
		if err == nil {
			return c.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.Join(fmt.Errorf("%s does not listen: %s", s.Name, measure.Tail(s.errs.String())), s.stop())
}

// stop ends it. Those that were told to end do not say that they did.
func (s *server) stop() error {
	if s.cmd == nil {
		return nil
	}
	err := s.cmd.Process.Signal(syscall.SIGTERM)
	_ = s.cmd.Wait() // nbdkit and qemu-nbd end differently
	s.cmd = nil
	if e := os.Remove(s.socket); e != nil && !errors.Is(e, os.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// cpu is the processor time that its process has used so far, threads that have ended included.
func (s *server) cpu() (time.Duration, error) {
	// A clock that counts another process's time: clock_getcpuclockid(3).
	const sched = 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^s.cmd.Process.Pid<<3|sched), &t); err != nil {
		return 0, fmt.Errorf("processor time of %s: %w", s.Name, err)
	}
	return time.Duration(t.Nano()), nil
}

// version is the first line of what a program says that it is.
func version(ctx context.Context, program string, args ...string) string {
	d, err := measure.Process{Path: program, Args: args}.Run(ctx)
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(string(d.Out), "\n")
	return line
}

// serveRaw is our server with a raw file, as a process of its own.
func serveRaw(ctx context.Context, file, socket string) (err error) {
	d, err := restore.OpenRaw(file, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	exports, err := nbd.NewStatic(nbd.Export{Disk: d})
	if err != nil {
		return err
	}
	l, err := nbd.Listen(ctx, "unix", socket)
	if err != nil {
		return err
	}
	return (&nbd.Server{Exports: exports}).Serve(ctx, l)
}
