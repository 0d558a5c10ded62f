package testvm

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// initramfs writes an archive that the kernel unpacks as its first root: cpio
// in the "newc" format (Linux, driver-api/early-userspace/buffer-format).
// Errors are kept until close.
type initramfs struct {
	f    *os.File
	w    *bufio.Writer
	ino  int
	seen map[string]bool // paths that are in it
	err  error
}

func createInitramfs(path string) (*initramfs, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	return &initramfs{f: f, w: bufio.NewWriter(f), seen: map[string]bool{"": true}}, nil
}

const (
	cpioDir  = 0o040755
	cpioFile = 0o100000
	cpioChar = 0o020600
)

// entry adds one member; parents are added as needed, repetitions skipped.
func (a *initramfs) entry(name string, mode, major, minor int, size int64, content io.Reader) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if a.err != nil || a.seen[name] {
		return
	}
	if dir := path.Dir(name); dir != "." {
		a.entry(dir, cpioDir, 0, 0, 0, nil)
	}
	a.seen[name] = true
	a.raw(name, mode, major, minor, size, content)
}

func (a *initramfs) raw(name string, mode, major, minor int, size int64, content io.Reader) {
	if a.err != nil {
		return
	}
	if size >= 1<<32 {
		a.err = fmt.Errorf("%s: too large for an initramfs", name)
		return
	}
	a.ino++
	// magic, ino, mode, uid, gid, nlink, mtime, size, dev, rdev, name length, check
	n, _ := fmt.Fprintf(a.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.ino, mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	a.pad(int64(n))
	if content == nil {
		return
	}
	copied, err := io.Copy(a.w, io.LimitReader(content, size))
	if err == nil && copied != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		a.err = fmt.Errorf("%s: %w", name, err)
	}
	a.pad(size)
}

// pad fills up to a multiple of four; bufio keeps its errors for Flush.
func (a *initramfs) pad(n int64) { _, _ = a.w.Write(make([]byte, -n&3)) }

func (a *initramfs) dir(name string) { a.entry(name, cpioDir, 0, 0, 0, nil) }
func (a *initramfs) char(name string, major, minor int) {
	a.entry(name, cpioChar, major, minor, 0, nil)
}

func (a *initramfs) text(name, content string, mode int) {
	a.entry(name, mode, 0, 0, int64(len(content)), strings.NewReader(content))
}

// file copies a host file, following symbolic links.
func (a *initramfs) file(name, host string, perm int) {
	if a.err != nil {
		return
	}
	f, err := os.Open(host)
	if err != nil {
		a.err = err
		return
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", host)
	}
	if err != nil {
		a.err = err
		return
	}
	a.entry(name, cpioFile|perm, 0, 0, st.Size(), f)
}

// program copies an executable, and the shared libraries it needs to where it
// looks for them.
func (a *initramfs) program(ctx context.Context, name, host string) {
	if a.err != nil {
		return
	}
	a.file(name, host, 0o755)
	out, err := run(ctx, "", "ldd", host)
	if err != nil {
		if ctx.Err() != nil {
			a.err = err
		}
		return // static
	}
	for field := range strings.FieldsSeq(string(out)) {
		if filepath.IsAbs(field) {
			a.file(field, field, 0o755)
		}
	}
}

// close ends the archive and reports the first error of all.
func (a *initramfs) close() error {
	a.raw("TRAILER!!!", 0, 0, 0, 0, nil)
	if err := a.w.Flush(); a.err == nil {
		a.err = err
	}
	if err := a.f.Close(); a.err == nil {
		a.err = err
	}
	return a.err
}
