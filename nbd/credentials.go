package nbd

import (
	"crypto/x509"
	"fmt"
	"net"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Client is who is at the other end of a connection, as far as the server has
// seen proof of it.
type Client struct {
	// Network is that of the connection: "unix", "tcp".
	Network string
	// Address is the client's, with its port; empty on a unix socket.
	Address string
	// Unix is what the kernel says about the process that connected; nil on
	// other networks.
	Unix *Credentials
	// TLS tells whether the connection is encrypted by now.
	TLS bool
	// Certificate is what the client has proven to own the key of, and that
	// the server's authority has signed; nil if it has shown none.
	Certificate *x509.Certificate
}

// Credentials are those of the process that called connect, as of then
// (SO_PEERCRED, unix(7)), in the server's user and PID namespaces.
type Credentials struct {
	UID, GID uint32
	PID      int32
}

// clientOf finds out what a connection tells by itself.
func clientOf(nc net.Conn) Client {
	c := Client{Network: nc.LocalAddr().Network()}
	if c.Network != "unix" {
		c.Address = nc.RemoteAddr().String()
		return c
	}
	u, ok := nc.(syscall.Conn)
	if !ok {
		return c
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return c
	}
	_ = raw.Control(func(fd uintptr) { // fails if it is closed: then there is nobody to know
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			c.Unix = &Credentials{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}
		}
	})
	return c
}

// Names are those in the client's certificate, as KIND=NAME with the kinds CN,
// DNS, IP, EMAIL and URI: its common name first, if it has one.
func (c Client) Names() []string {
	if c.Certificate == nil {
		return nil
	}
	var names []string
	if cn := c.Certificate.Subject.CommonName; cn != "" {
		names = append(names, "CN="+cn)
	}
	for _, n := range c.Certificate.DNSNames {
		names = append(names, "DNS="+n)
	}
	for _, ip := range c.Certificate.IPAddresses {
		names = append(names, "IP="+ip.String())
	}
	for _, m := range c.Certificate.EmailAddresses {
		names = append(names, "EMAIL="+m)
	}
	for _, u := range c.Certificate.URIs {
		names = append(names, "URI="+u.String())
	}
	return names
}

// String is for logs.
func (c Client) String() string {
	var b strings.Builder
	b.WriteString(c.Network)
	if c.Address != "" {
		b.WriteString(" " + c.Address)
	}
	if c.Unix != nil {
		fmt.Fprintf(&b, " uid %d, pid %d", c.Unix.UID, c.Unix.PID)
	}
	if names := c.Names(); len(names) > 0 {
		fmt.Fprintf(&b, " %q", names[0])
	}
	return b.String()
}
