package kernel

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Local is a listener whose clients are in this process, or have their end from it: pairs
// of sockets that have no address, so that nobody else can connect.
type Local struct {
	pending chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

var _ net.Listener = (*Local)(nil)

// NewLocal makes a Local.
func NewLocal() *Local {
	return &Local{pending: make(chan net.Conn), closed: make(chan struct{})}
}

// Dial waits until Accept takes the other end.
func (l *Local) Dial(ctx context.Context) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	near, err := fileConn(fds[0])
	far, farErr := fileConn(fds[1])
	if err := errors.Join(err, farErr); err != nil {
		for _, c := range []net.Conn{near, far} {
			if c != nil {
				_ = c.Close()
			}
		}
		return nil, err
	}
	select {
	case l.pending <- far:
		return near, nil
	case <-l.closed:
		err = net.ErrClosed
	case <-ctx.Done():
		err = ctx.Err()
	}
	_ = near.Close() // nothing was sent
	_ = far.Close()
	return nil, err
}

func fileConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "socketpair")
	defer func() { _ = f.Close() }() // it is duplicated
	return net.FileConn(f)
}

// Accept implements net.Listener.
func (l *Local) Accept() (net.Conn, error) {
	select {
	case c := <-l.pending:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *Local) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements net.Listener.
func (l *Local) Addr() net.Addr { return &net.UnixAddr{Net: "unix"} }
