package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
)

// DefaultPort is the protocol's TCP port.
const DefaultPort = "10809"

// ErrURI is wrapped when a text is no NBD URI, or one that needs what is not there.
var ErrURI = errors.New("not a usable NBD URI")

// URI says where an export is: doc/uri.md of github.com/NetworkBlockDevice/nbd.
type URI struct {
	Network string // "tcp" or "unix"
	Address string // host:port, or path of the socket
	Export  string // may be empty: the server's default
}

// IsURI tells whether a text means to be an NBD URI.
func IsURI(s string) bool {
	scheme, _, ok := strings.Cut(s, "://")
	return ok && (scheme == "nbd" || strings.HasPrefix(scheme, "nbd+") || scheme == "nbds" || strings.HasPrefix(scheme, "nbds+"))
}

// ParseURI reads nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH. Errors wrap
// [ErrURI]; nbds, which means TLS, is one of them.
func ParseURI(s string) (URI, error) {
	u, err := url.Parse(s)
	if err != nil {
		return URI{}, fmt.Errorf("%w: %w", ErrURI, err)
	}
	export := strings.TrimPrefix(u.Path, "/")
	if !validString(export) {
		return URI{}, fmt.Errorf("%w: %q: name of the export", ErrURI, s)
	}
	socket := u.Query().Get("socket")
	switch u.Scheme {
	case "nbd":
		if u.Opaque != "" || socket != "" {
			return URI{}, fmt.Errorf("%w: %q: nbd://HOST[:PORT]/EXPORT, or nbd+unix:///EXPORT?socket=PATH", ErrURI, s)
		}
		host, port := u.Hostname(), u.Port()
		if host == "" {
			host = "localhost"
		}
		if port == "" {
			port = DefaultPort
		}
		return URI{"tcp", net.JoinHostPort(host, port), export}, nil
	case "nbd+unix":
		if u.Host != "" || u.Opaque != "" || socket == "" || strings.Contains(socket, "\x00") {
			return URI{}, fmt.Errorf("%w: %q: nbd+unix:///EXPORT?socket=PATH", ErrURI, s)
		}
		return URI{"unix", socket, export}, nil
	case "nbds", "nbds+unix":
		return URI{}, fmt.Errorf("%w: %q: TLS is not possible here", ErrURI, s)
	}
	return URI{}, fmt.Errorf("%w: %q: scheme %q", ErrURI, s, u.Scheme)
}
