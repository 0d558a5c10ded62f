package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrSocketBusy is wrapped when another process serves on a unix socket, or
// something that is no socket is in its place.
var ErrSocketBusy = errors.New("address is in use")

// SocketMode is who may connect to a unix socket: those who may write to its
// file, unix(7).
type SocketMode struct {
	Perm  fs.FileMode // zero: 0600
	Group int         // zero: that of the process
}

// Listen listens on a "unix", "tcp", "tcp4" or "tcp6" address. A unix socket is
// open to its owner only (mode 0600), from its first moment. One that was left
// behind is replaced, if nobody listens on it. Closing the listener removes it.
func Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return ListenMode(ctx, network, address, SocketMode{})
}

// ListenMode is Listen with other rights for a unix socket. It never has wider
// ones than these, not for a moment.
func ListenMode(ctx context.Context, network, address string, mode SocketMode) (net.Listener, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
		var lc net.ListenConfig
		return lc.Listen(ctx, network, address)
	case "unix":
	default:
		return nil, fmt.Errorf("listen: %w", net.UnknownNetworkError(network))
	}
	l, err := listenUnix(ctx, address, mode)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(ctx, address); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", address, err)
		}
		l, err = listenUnix(ctx, address, mode)
	}
	return l, err
}

func listenUnix(ctx context.Context, path string, mode SocketMode) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		// Linux gives the file the mode of the unbound socket (net/unix/af_unix.c,
		// unix_bind_bsd), so there is no moment at which others may connect.
		return errors.Join(raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil || mode == (SocketMode{}) {
		return l, err
	}
	if err := mode.apply(path); err != nil {
		return nil, errors.Join(fmt.Errorf("rights of %s: %w", path, err), l.Close())
	}
	return l, nil
}

// apply gives a socket its group first, and then the group its rights: in between
// it is nobody's but the owner's. Both go by a descriptor, so that nothing else
// is meant that was put in its place.
func (m SocketMode) apply(path string) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("%w: not a socket", ErrSocketBusy)
	}
	if m.Group != 0 {
		if err := unix.Fchownat(fd, "", -1, m.Group, unix.AT_EMPTY_PATH); err != nil {
			return fmt.Errorf("group %d: %w", m.Group, err)
		}
	}
	if m.Perm != 0 {
		// fchmod refuses descriptors of this kind, the name of one does not.
		return os.Chmod("/proc/self/fd/"+strconv.Itoa(fd), m.Perm.Perm())
	}
	return nil
}

// removeStale removes a socket on which nobody listens.
func removeStale(ctx context.Context, path string) error {
	if err := probeStale(ctx, path); err != nil {
		return err
	}
	// Another process may put its own socket here between probe and removal. So
	// what is removed is first moved aside and probed again.
	aside := path + ".stale." + strconv.Itoa(os.Getpid())
	if err := os.Rename(path, aside); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	if err := probeStale(ctx, aside); err != nil {
		back := unix.Renameat2(unix.AT_FDCWD, aside, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
		return errors.Join(err, back)
	}
	return os.Remove(aside)
}

// probeStale returns nil if path is a socket on which nobody listens.
func probeStale(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	if st.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%w: not a socket", ErrSocketBusy)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		_ = c.Close() // it only had to answer
		return ErrSocketBusy
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, os.ErrNotExist):
		return nil
	}
	return fmt.Errorf("%w: %w", ErrSocketBusy, err)
}
