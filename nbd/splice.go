package nbd

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is how much of a payload may wait on its way to a file, in bytes.
	pipeSize = 1 << 20
	// page is where parts of a payload end: what ends within a page makes the
	// kernel read the rest of it.
	page = 4 << 10
)

// splicer moves payloads from a unix socket to a file: the kernel hands the
// socket's pages to a pipe, so that the client can send on, and copies them once,
// into the page cache. One goroutine uses it.
type splicer struct {
	r, w int // the pipe
	size int
	held int64 // bytes in the pipe
}

func newSplicer() (*splicer, error) {
	var p [2]int
	// It must not block: a client that sends single bytes may fill the pipe's slots
	// with less than a page.
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	s := &splicer{r: p[0], w: p[1]}
	var err error
	if s.size, err = unix.FcntlInt(uintptr(s.w), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		s.size, err = unix.FcntlInt(uintptr(s.w), unix.F_GETPIPE_SZ, 0) // no more is allowed
	}
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("fcntl", err), s.Close())
	}
	return s, nil
}

// Close frees the pipe.
func (s *splicer) Close() error {
	return errors.Join(unix.Close(s.r), unix.Close(s.w))
}

// move takes n bytes from the socket and writes them to the file at off. left is
// how many of them are still in the socket, and s.held how many in the pipe, after
// the file took no more, for which it may have its reasons. off is where they belong.
// The error is the connection's. p is told of the waiting.
func (s *splicer) move(u *unixConn, p *progress, fd int, off, n int64) (at, left int64, err error) {
	if err := u.enter(); err != nil {
		return off, n, err
	}
	defer u.leave()
	dry := false
	for n > 0 {
		m, err := unix.Splice(u.fd, nil, s.w, nil, int(min(n, int64(s.size))), unix.SPLICE_F_MOVE)
		switch {
		case m > 0:
			n, s.held, dry = n-m, s.held+m, false
			p.got(int(m))
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN) && !dry:
			dry = true
			p.waits(true)
			err := u.await()
			p.got(0)
			if err != nil {
				return off, n, err
			}
			continue
		case errors.Is(err, unix.EAGAIN) && s.held > 0:
			// There is something to read: so the pipe has no room.
			if !s.drop(fd, &off, s.held) {
				return off, n, nil
			}
			continue
		case errors.Is(err, unix.EAGAIN):
			dry = false // somebody was mistaken
			continue
		case err != nil:
			return off, n, os.NewSyscallError("splice", err)
		case u.stopped.Load():
			return off, n, os.ErrDeadlineExceeded
		default:
			return off, n, io.ErrUnexpectedEOF
		}
		whole := s.held
		if n > 0 {
			whole -= (off + s.held) % page
		}
		if whole > 0 && !s.drop(fd, &off, whole) {
			return off, n, nil
		}
	}
	return off, 0, nil
}

// drop writes n bytes from the pipe to the file. It returns false if the file
// takes no more.
func (s *splicer) drop(fd int, off *int64, n int64) bool {
	for n > 0 {
		m, err := unix.Splice(s.r, nil, fd, off, int(n), unix.SPLICE_F_MOVE)
		if m > 0 {
			n, s.held = n-m, s.held-m
		} else if !errors.Is(err, unix.EINTR) {
			return false
		}
	}
	return true
}

// take moves what the pipe holds, at most all of p, to p.
func (s *splicer) take(p []byte) (int, error) {
	n := int(min(int64(len(p)), s.held))
	for done := 0; done < n; {
		m, err := unix.Read(s.r, p[done:n])
		if m > 0 {
			done, s.held = done+m, s.held-int64(m)
		} else if !errors.Is(err, unix.EINTR) {
			return done, fmt.Errorf("pipe has less than was put into it: %w", errors.Join(err, io.ErrUnexpectedEOF))
		}
	}
	return n, nil
}
