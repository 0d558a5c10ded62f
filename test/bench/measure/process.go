package measure

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Done is a process that has ended well.
type Done struct {
	Out  []byte
	Wall time.Duration
	CPU  time.Duration // of it and of those of its children that it waited for
}

// Process is a program as it is started.
type Process struct {
	Path  string
	Args  []string
	Env   []string // besides this program's own
	Dir   string   // where it runs; here if empty
	Stdin *os.File
}

// Run starts it and waits for its end. The error holds the end of what it printed.
func (p Process) Run(ctx context.Context) (Done, error) {
	cmd := exec.CommandContext(ctx, p.Path, p.Args...)
	cmd.Env, cmd.Dir = append(os.Environ(), p.Env...), p.Dir
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if p.Stdin != nil {
		cmd.Stdin = p.Stdin // a file is handed on as it is, not copied
	}
	begin := time.Now()
	err := cmd.Run()
	d := Done{Out: out.Bytes(), Wall: time.Since(begin)}
	if err != nil {
		return d, fmt.Errorf("%s: %w: %s", p, err, Tail(errs.String()+out.String()))
	}
	d.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return d, nil
}

func (p Process) String() string {
	s := filepath.Base(p.Path) + " " + strings.Join(p.Args, " ")
	if p.Stdin != nil {
		s += " < " + p.Stdin.Name()
	}
	return s
}

// Tail is the end of what a process printed, for an error.
func Tail(s string) string {
	s = strings.TrimSpace(s)
	return s[max(0, len(s)-2000):]
}

// SizeOf is the size of all files below dir, in bytes.
func SizeOf(dir string) (int64, error) {
	var n int64
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	return n, err
}
