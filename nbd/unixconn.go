package nbd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// spinTime is for how long a thread looks for the next request before it
	// sleeps. Sleeping and being woken takes about as long, for both sides.
	spinTime = 50 * time.Microsecond
	// spinAfter is how many requests a connection must have had without any other
	// having one.
	spinAfter = 32
)

// sendBuffer is what replies may wait in a unix socket, in bytes. The usual
// limit, 208 KiB, lets a client that reads large blocks run dry while the next
// one is prepared.
const sendBuffer = 1 << 20

// unixConn is a unix socket that can be made blocking. Then the goroutine that
// reads sleeps in the kernel until a request comes, which costs a system call and
// two changes of goroutines less per request than the runtime's poller, but holds a
// thread: worth it for connections that transmit, of which there are few.
//
// A read deadline in the past and Close wake who sleeps, as for any [net.Conn];
// other read deadlines have no effect any more.
type unixConn struct {
	net.Conn // until it blocks

	blocks atomic.Bool
	fd     int

	// refs counts who is in a system call; below zero the socket is being closed.
	refs    atomic.Int64
	stopped atomic.Bool  // the read deadline has passed
	until   atomic.Int64 // write deadline, Unix ns
	mu      sync.Mutex   // held to change the mode, and to act on it
	closed  bool

	// Of the goroutine that reads:
	busiest *atomic.Pointer[unixConn] // who had the last request, of all connections
	alone   int                       // reads since it was somebody else
	gap     time.Duration             // moving mean of the time until something comes
	working bool                      // the client waits for others than the reader
}

const refsClosed = -1 << 32

var (
	_ net.Conn        = (*unixConn)(nil)
	_ syscall.RawConn = unixRaw{}
)

// block makes the socket blocking. Nobody may be reading or writing, but any
// other method may be called meanwhile. timeout is the time of write deadlines.
func (u *unixConn) block(timeout time.Duration) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return net.ErrClosed
	}
	sc, ok := u.Conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	fd := -1
	if cerr := raw.Control(func(was uintptr) { fd, err = unix.FcntlInt(was, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil || err != nil {
		return errors.Join(cerr, err)
	}
	// A sender looks at its deadline that often.
	wait := unix.NsecToTimeval(max(timeout/4, 10*time.Millisecond).Nanoseconds())
	err = errors.Join(unix.SetNonblock(fd, false), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait))
	if err != nil {
		return errors.Join(fmt.Errorf("blocking socket: %w", err), unix.Close(fd))
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer) // as much as is allowed
	}
	_ = u.Conn.Close() // the runtime's hold on it: the socket stays open
	u.fd = fd
	u.blocks.Store(true)
	return nil
}

func (u *unixConn) enter() error {
	for {
		n := u.refs.Load()
		if n < 0 {
			return net.ErrClosed
		}
		if u.refs.CompareAndSwap(n, n+1) {
			return nil
		}
	}
}

func (u *unixConn) leave() {
	if u.refs.Add(-1) == refsClosed {
		_ = unix.Close(u.fd) // it was shut down, and has nothing more to say
	}
}

func (u *unixConn) Read(p []byte) (int, error) {
	if !u.blocks.Load() {
		return u.Conn.Read(p)
	}
	if err := u.enter(); err != nil {
		return 0, err
	}
	defer u.leave()
	if u.stopped.Load() {
		return 0, os.ErrDeadlineExceeded
	}
	start := time.Now()
	defer func() {
		u.gap += (min(time.Since(start), 20*spinTime) - u.gap) / 8
		if u.busiest.Load() == u {
			u.alone++
		} else {
			u.busiest.Store(u)
			u.alone = 0
		}
	}()
	u.spin(start)
	for {
		// Not unix.Read: the race detector knows what package syscall passes on.
		n, err := syscall.Read(u.fd, p)
		switch {
		case n > 0:
			return n, nil
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case u.stopped.Load():
			return 0, os.ErrDeadlineExceeded
		default:
			return 0, io.EOF
		}
	}
}

// spin looks for something to read for a while, if that is likely to come soon,
// and nobody else has work for the processor.
func (u *unixConn) spin(start time.Time) {
	if u.working || u.gap > spinTime || u.alone < spinAfter {
		return
	}
	var one byte
	for u.busiest.Load() == u {
		// It does not block, so the runtime need not know.
		_, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(u.fd), uintptr(unsafe.Pointer(&one)), 1, unix.MSG_DONTWAIT|unix.MSG_PEEK, 0, 0)
		if errno != unix.EAGAIN || time.Since(start) > spinTime {
			return
		}
		// The client may have to run on this very processor to get on.
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
}

// await waits until there is something to read, or nothing will come any more. The caller has
// entered.
func (u *unixConn) await() error {
	if u.stopped.Load() {
		return os.ErrDeadlineExceeded
	}
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLIN | unix.POLLRDHUP}}, -1)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
	}
}

func (u *unixConn) Write(p []byte) (int, error) {
	if !u.blocks.Load() {
		return u.Conn.Write(p)
	}
	if err := u.enter(); err != nil {
		return 0, err
	}
	defer u.leave()
	for done := 0; ; {
		n, err := syscall.Write(u.fd, p[done:])
		if n > 0 {
			if done += n; done == len(p) {
				return done, nil
			}
		} else if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return done, os.NewSyscallError("write", err)
		}
		if u.late() {
			return done, os.ErrDeadlineExceeded
		}
	}
}

// late tells whether the write deadline has passed.
func (u *unixConn) late() bool {
	until := u.until.Load()
	return until > 0 && time.Now().UnixNano() > until
}

// SetWriteDeadline implements [net.Conn]; it does not wake who waits already.
func (u *unixConn) SetWriteDeadline(t time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.until.Store(t.UnixNano())
	if !u.blocks.Load() {
		return u.Conn.SetWriteDeadline(t)
	}
	return nil
}

// SetReadDeadline implements [net.Conn].
func (u *unixConn) SetReadDeadline(t time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.blocks.Load() {
		return u.Conn.SetReadDeadline(t)
	}
	if u.closed || t.IsZero() || t.After(time.Now()) {
		return nil
	}
	u.stopped.Store(true)
	return os.NewSyscallError("shutdown", unix.Shutdown(u.fd, unix.SHUT_RD))
}

// Close implements [net.Conn].
func (u *unixConn) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.blocks.Load() {
		u.closed = true
		return u.Conn.Close()
	}
	if u.closed {
		return net.ErrClosed
	}
	u.closed = true
	err := unix.Shutdown(u.fd, unix.SHUT_RDWR)
	if errors.Is(err, unix.ENOTCONN) {
		err = nil
	}
	if u.refs.Add(refsClosed) == refsClosed {
		err = errors.Join(err, unix.Close(u.fd))
	}
	return err
}

// SyscallConn implements [syscall.Conn].
func (u *unixConn) SyscallConn() (syscall.RawConn, error) { return unixRaw{u}, nil }

type unixRaw struct{ u *unixConn }

// over is the socket's own way while it does not block.
func (r unixRaw) over() (syscall.RawConn, error) {
	if sc, ok := r.u.Conn.(syscall.Conn); ok {
		return sc.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

func (r unixRaw) Control(f func(uintptr)) error {
	if !r.u.blocks.Load() {
		c, err := r.over()
		if err != nil {
			return err
		}
		return c.Control(f)
	}
	if err := r.u.enter(); err != nil {
		return err
	}
	defer r.u.leave()
	f(uintptr(r.u.fd))
	return nil
}

func (r unixRaw) Read(f func(uintptr) bool) error {
	if !r.u.blocks.Load() {
		c, err := r.over()
		if err != nil {
			return err
		}
		return c.Read(f)
	}
	if err := r.u.enter(); err != nil {
		return err
	}
	defer r.u.leave()
	for !f(uintptr(r.u.fd)) {
		if r.u.stopped.Load() {
			return os.ErrDeadlineExceeded
		}
	}
	return nil
}

func (r unixRaw) Write(f func(uintptr) bool) error {
	if !r.u.blocks.Load() {
		c, err := r.over()
		if err != nil {
			return err
		}
		return c.Write(f)
	}
	if err := r.u.enter(); err != nil {
		return err
	}
	defer r.u.leave()
	for !f(uintptr(r.u.fd)) {
		if r.u.late() {
			return os.ErrDeadlineExceeded
		}
	}
	return nil
}
