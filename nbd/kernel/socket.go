package kernel

import (
	"context"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/nbd"
)

// link is a connection that was negotiated. The kernel has a reference of its own once it took it.
type link struct {
	file   *os.File
	remote nbd.Remote
}

// negotiate makes a link.
func (o *Options) negotiate(ctx context.Context) (_ link, err error) {
	c, err := o.Dial(ctx)
	if err != nil {
		return link{}, err
	}
	defer func() { _ = c.Close() }() // the descriptor is duplicated
	r, err := nbd.Negotiate(ctx, c, o.Export)
	if err != nil {
		return link{}, err
	}
	f, ok := c.(interface{ File() (*os.File, error) })
	if !ok {
		return link{}, fmt.Errorf("a %T can't be given to the kernel", c)
	}
	file, err := f.File()
	return link{file, r}, err
}

// dead tells whether the connection is shut down in both directions, which is what the driver does to one
// that it gives up.
func (l link) dead() bool {
	p := []unix.PollFd{{Fd: int32(l.file.Fd())}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
}

// taken tells whether the driver uses the connection: it gives it its own send timeout
// (nbd_reconnect_socket and nbd_start_device in drivers/block/nbd.c).
func (l link) taken() bool {
	tv, err := unix.GetsockoptTimeval(int(l.file.Fd()), unix.SOL_SOCKET, unix.SO_SNDTIMEO)
	return err == nil && (tv.Sec != 0 || tv.Usec != 0)
}

func (l link) close() { _ = l.file.Close() } // a socket: nothing is lost

// DialURI dials what a URI names, for Options.
func DialURI(u nbd.URI) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, u.Network, u.Address)
	}
}
