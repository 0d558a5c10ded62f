// Package initramfs writes archives that a kernel unpacks as its first root: cpio in the "newc" format (Linux,
// driver-api/early-userspace/buffer-format).
//
// It imports no other package of Tidemark.
package initramfs

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// Modes of members, to be combined with permissions.
const (
	File = 0o100000
	dir  = 0o040755
	char = 0o020600
)

// Writer writes one archive. Errors are kept until Close; Err shows the first so far.
type Writer struct {
	w    *bufio.Writer
	ino  int
	seen map[string]bool // paths that are in it
	err  error
}

// New writes to w, which stays the caller's.
func New(w io.Writer) *Writer {
	return &Writer{w: bufio.NewWriter(w), seen: map[string]bool{"": true}}
}

// Err is the first error so far.
func (a *Writer) Err() error { return a.err }

// Fail makes err the first error, unless there was one.
func (a *Writer) Fail(err error) {
	if a.err == nil {
		a.err = err
	}
}

// entry adds one member; parents are added as needed, repetitions skipped.
func (a *Writer) entry(name string, mode, major, minor int, size int64, content io.Reader) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if a.err != nil || a.seen[name] {
		return
	}
	if parent := path.Dir(name); parent != "." {
		a.entry(parent, dir, 0, 0, 0, nil)
	}
	a.seen[name] = true
	a.raw(name, mode, major, minor, size, content)
}

func (a *Writer) raw(name string, mode, major, minor int, size int64, content io.Reader) {
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
func (a *Writer) pad(n int64) { _, _ = a.w.Write(make([]byte, -n&3)) }

// Dir adds a directory.
func (a *Writer) Dir(name string) { a.entry(name, dir, 0, 0, 0, nil) }

// Char adds a character device.
func (a *Writer) Char(name string, major, minor int) { a.entry(name, char, major, minor, 0, nil) }

// Text adds a file with this content.
func (a *Writer) Text(name, content string, perm int) {
	a.entry(name, File|perm, 0, 0, int64(len(content)), strings.NewReader(content))
}

// Host copies a regular file of the host, following symbolic links.
func (a *Writer) Host(name, host string, perm int) {
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
	a.entry(name, File|perm, 0, 0, st.Size(), f)
}

// Close ends the archive and reports the first error of all.
func (a *Writer) Close() error {
	a.raw("TRAILER!!!", 0, 0, 0, 0, nil)
	if err := a.w.Flush(); a.err == nil {
		a.err = err
	}
	return a.err
}
