package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// writePiece is what must leave within one write timeout: a slow peer is
// served, a peer that takes nothing is not.
const writePiece = 1 << 20

// ErrWriteTimeout is wrapped when a client takes no replies.
var ErrWriteTimeout = errors.New("client takes no replies")

// output is the sending side of a connection. Whatever is sent in one call
// arrives in one piece; many goroutines may call. The first error is final and
// closes the connection, which wakes the goroutine that reads from it.
type output struct {
	mu      sync.Mutex
	to      io.Writer // conn, or TLS over it
	conn    net.Conn
	under   *gathering      // what TLS writes to, which arms the deadline; nil without
	raw     syscall.RawConn // nil: no sendfile
	timeout time.Duration
	armed   time.Time // when the write deadline was last set
	err     error
	ended   func() // called at the first error, unless nil
	file    fileSend
	bound   func(uintptr) bool // o.file.step, bound once
}

func newOutput(conn net.Conn, timeout time.Duration) *output {
	o := &output{to: conn, conn: conn, timeout: timeout}
	switch c := conn.(type) {
	case *net.TCPConn:
		o.raw, _ = c.SyscallConn() // without it there is just no sendfile
	case *unixConn:
		o.raw, _ = c.SyscallConn()
	}
	o.bound = o.file.step
	return o
}

// newTLSOutput sends over TLS, where the kernel cannot send a file.
func newTLSOutput(over *tls.Conn, under *gathering) *output {
	return &output{to: over, conn: under.Conn, under: under, timeout: under.timeout}
}

// send sends the parts as one message.
func (o *output) send(parts ...[]byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sendLocked(parts...)
}

func (o *output) sendLocked(parts ...[]byte) error {
	for _, p := range parts {
		for len(p) > 0 && o.err == nil {
			n := min(len(p), writePiece)
			if o.err = o.arm(); o.err == nil {
				_, o.err = o.to.Write(p[:n])
			}
			p = p[n:]
		}
	}
	return o.check()
}

// arm moves the write deadline. It is left alone while most of it remains,
// because moving it costs as much as a small reply.
func (o *output) arm() error {
	if o.under != nil {
		return nil
	}
	now := time.Now()
	if now.Sub(o.armed) < o.timeout/4 {
		return nil
	}
	o.armed = now
	return o.conn.SetWriteDeadline(now.Add(o.timeout))
}

func (o *output) check() error {
	if o.err == nil {
		return nil
	}
	var timeout net.Error
	if errors.As(o.err, &timeout) && timeout.Timeout() {
		o.err = fmt.Errorf("%w for %v", ErrWriteTimeout, o.timeout)
	}
	_ = o.conn.Close() // the stream is torn: there is nothing to close cleanly
	if o.ended != nil {
		o.ended()
	}
	return o.err
}

// failure is the first error, nil if there was none.
func (o *output) failure() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// canSendFile tells whether sendFileLocked works on this connection.
func (o *output) canSendFile() bool { return o.raw != nil }

// sendFileLocked sends up to n bytes of a file from offset off. It tells how many
// left; fewer than n without an error of the connection means that the file
// ended or failed.
func (o *output) sendFileLocked(fd uintptr, off, n int64) (int64, error) {
	var sent int64
	for sent < n && o.err == nil {
		o.file = fileSend{fd: int(fd), off: off + sent, left: min(n-sent, 4*writePiece)}
		want := o.file.left
		if o.err = o.arm(); o.err != nil {
			break
		}
		o.err = o.raw.Write(o.bound)
		sent += want - o.file.left
		if o.err == nil && o.file.peer {
			o.err = o.file.err
		}
		if o.file.err != nil {
			break
		}
	}
	return sent, o.check()
}

// fileSend is one run of sendfile calls, kept in the output so that a call
// makes no garbage.
type fileSend struct {
	fd   int
	off  int64
	left int64
	err  error
	peer bool // err is the connection's, not the file's
}

// step is called when the socket may take more. It returns false to wait.
func (f *fileSend) step(socket uintptr) bool {
	for f.left > 0 {
		n, err := unix.Sendfile(int(socket), f.fd, &f.off, int(f.left))
		switch {
		case n > 0:
			f.left -= int64(n)
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false
		case err == nil:
			f.err = io.ErrUnexpectedEOF
			return true
		default:
			f.err = err
			f.peer = errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ENOTCONN)
			return true
		}
	}
	return true
}
