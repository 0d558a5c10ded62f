package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/nbd"
)

// serverOptions say where and to whom exports are served. They are the flags of
// every command that serves some.
type serverOptions struct {
	socket, listen     string
	socketMode         string
	socketGroup        string
	tls, certs         string
	verify             bool
	allow              []string
	connections, each  int
	requests           int
	memory             string
	handshake, request time.Duration
	reply, idle        time.Duration
	rules              []nbd.Rule
	mode               nbd.SocketMode
	memoryBytes        int64
}

const serverHelp = `A unix socket is the owner's alone unless --socket-mode and --socket-group say otherwise;
whoever can connect to a TCP address can read the disks, unless TLS keeps them out.
--tls-certs names a folder with ca-cert.pem, server-cert.pem, server-key.pem and maybe
ca-crl.pem, as QEMU and libnbd lay them out; a client then has to use TLS and to show a
certificate that ca-cert.pem has signed. Files that change are read again. With --allow, a
client sees those exports alone that a rule WHO:EXPORTS gives it; WHO is CN=, DNS=, IP=,
EMAIL= or URI= and a name in its certificate, UID= or GID= and that of the process at a unix
socket, or * for everybody; a * in either part stands for any text. docs/nbd-security.md
tells more.`

func (o *serverOptions) addFlags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.socket, "socket", "", "unix socket to make and listen on")
	f.StringVar(&o.listen, "listen", "", "TCP address to listen on, such as 127.0.0.1:10809")
	f.StringVar(&o.socketMode, "socket-mode", "0600", "who may connect to the socket: those who may write to it")
	f.StringVar(&o.socketGroup, "socket-group", "", "group of the socket, a name or a number")
	f.StringVar(&o.certs, "tls-certs", "", "folder with certificates: turns TLS on")
	f.StringVar(&o.tls, "tls", "", "none, optional or required (what it is with --tls-certs)")
	f.BoolVar(&o.verify, "tls-verify-client", true, "a client must show a certificate; with =false it may")
	f.StringArrayVar(&o.allow, "allow", nil, "WHO:EXPORTS, who may see which exports, such as 'CN=standby1:web1@*'; may be given several times")
	f.IntVar(&o.connections, "max-connections", nbd.DefaultMaxConnections, "connections at once")
	f.IntVar(&o.each, "max-connections-per-client", nbd.DefaultMaxPerClient, "connections of one address, or of one user at a unix socket")
	f.IntVar(&o.requests, "max-requests", nbd.DefaultMaxRequests, "slow requests at once, of all connections")
	f.StringVar(&o.memory, "max-memory", humanize.IBytes(nbd.DefaultMaxMemory), "memory for slow requests, of all connections; at least 64 MiB")
	f.DurationVar(&o.handshake, "handshake-timeout", nbd.DefaultHandshakeTimeout, "how long a client may take to choose an export")
	f.DurationVar(&o.request, "request-timeout", nbd.DefaultRequestTimeout, "how long a client may take for the rest of a request, or the next 64 KiB of it")
	f.DurationVar(&o.reply, "reply-timeout", nbd.DefaultWriteTimeout, "how long a client may leave a reply untaken, or the next 1 MiB of it")
	f.DurationVar(&o.idle, "idle-timeout", 0, "how long a client may send no request; 0 is forever")
	_ = c.RegisterFlagCompletionFunc("tls", cobra.FixedCompletions([]string{"none", "optional", "required"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.MarkFlagDirname("tls-certs")
	for _, none := range []string{"allow", "socket-mode", "socket-group", "listen", "max-memory"} {
		_ = c.RegisterFlagCompletionFunc(none, cobra.NoFileCompletions)
	}
}

// check tells what is wrong with the flags of a command before anything is done.
func (o *serverOptions) check(command string) error {
	bad := func(format string, a ...any) error {
		return usageError{fmt.Errorf(command+": "+format, a...)}
	}
	if (o.socket == "") == (o.listen == "") {
		return bad("give --socket PATH or --listen ADDR")
	}
	perm, err := strconv.ParseUint(o.socketMode, 8, 32)
	if err != nil || perm == 0 || perm > 0o777 {
		return bad("--socket-mode %s: must be octal, such as 0660", o.socketMode)
	}
	if perm != 0o600 {
		o.mode.Perm = os.FileMode(perm)
	}
	if o.socketGroup != "" {
		if o.mode.Group, err = groupID(o.socketGroup); err != nil {
			return bad("--socket-group: %w", err)
		}
		if perm&0o020 == 0 {
			return bad("--socket-group %s: the group may not connect with --socket-mode %s; 0660 lets it", o.socketGroup, o.socketMode)
		}
	}
	if o.listen != "" && o.mode != (nbd.SocketMode{}) {
		return bad("--socket-mode and --socket-group go with --socket")
	}
	switch {
	case o.tls == "" && o.certs == "":
		o.tls = "none"
	case o.tls == "":
		o.tls = "required"
	case o.tls != "none" && o.tls != "optional" && o.tls != "required":
		return bad("--tls %s: must be none, optional or required", o.tls)
	case o.tls != "none" && o.certs == "":
		return bad("--tls %s needs --tls-certs DIR, with ca-cert.pem, server-cert.pem and server-key.pem", o.tls)
	}
	for _, text := range o.allow {
		r, err := nbd.ParseRule(text)
		if err != nil {
			return bad("--allow: %w", err)
		}
		switch kind, _, _ := strings.Cut(strings.ToUpper(text), "="); {
		case strings.HasPrefix(text, "*:"):
		case kind == "UID" || kind == "GID":
			if o.socket == "" {
				return bad("--allow %s: who the process is shows on a unix socket alone: use --socket", text)
			}
		case o.tls == "none":
			return bad("--allow %s: certificates are shown with TLS alone: use --tls-certs", text)
		}
		o.rules = append(o.rules, r)
	}
	n, err := humanize.ParseBytes(o.memory)
	if err != nil || n > math.MaxInt64 || n < nbd.MinMaxMemory {
		return bad("--max-memory %s: a size of at least 64MiB", o.memory)
	}
	o.memoryBytes = int64(n)
	if o.connections < 1 || o.each < 1 || o.requests < 1 || o.handshake <= 0 || o.request <= 0 || o.reply <= 0 || o.idle < 0 {
		return bad("limits must be positive")
	}
	return nil
}

func groupID(name string) (int, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		id, numErr := strconv.ParseUint(name, 10, 31)
		if numErr != nil {
			return 0, err
		}
		return int(id), nil
	}
	return strconv.Atoi(g.Gid)
}

// bind listens, and returns the URI of the export with this name.
func (o *serverOptions) bind(ctx context.Context, name string) (net.Listener, string, error) {
	network, addr, scheme := "unix", o.socket, "nbd"
	if o.listen != "" {
		network, addr = "tcp", o.listen
	}
	if o.tls == "required" {
		scheme = "nbds"
	}
	l, err := nbd.ListenMode(ctx, network, addr, o.mode)
	if err != nil {
		return nil, "", err
	}
	if network == "unix" {
		return l, scheme + "+unix:///" + name + "?socket=" + absolute(o.socket), nil
	}
	return l, scheme + "://" + l.Addr().String() + "/" + name, nil
}

// serverLog is where a server tells of clients that were cut off and disks that failed.
func serverLog() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// server makes the server of these exports.
func (o *serverOptions) server(exports nbd.Exports) (*nbd.Server, error) {
	log := serverLog()
	if len(o.rules) > 0 {
		exports = nbd.Restrict(exports, o.rules...)
	}
	s := &nbd.Server{
		Exports: exports, Log: log,
		MaxConnections: o.connections, MaxPerClient: o.each, MaxRequests: o.requests, MaxMemory: o.memoryBytes,
		HandshakeTimeout: o.handshake, RequestTimeout: o.request, WriteTimeout: o.reply, IdleTimeout: o.idle,
	}
	if o.tls != "none" {
		certs, err := nbd.LoadCertificates(o.certs, o.verify, log)
		if err != nil {
			return nil, err
		}
		s.TLS = &nbd.TLS{Required: o.tls == "required", Config: certs.Config}
	}
	return s, nil
}

var errOpenToAll = errors.New("anyone who can reach this address can read the disks: --tls-certs keeps others out")

// openToAll tells whether the exports are served on an address that other hosts may
// reach, to everybody.
func (o *serverOptions) openToAll(l net.Listener) error {
	a, ok := l.Addr().(*net.TCPAddr)
	if !ok || a.IP.IsLoopback() || o.tls == "required" && o.verify {
		return nil
	}
	return errOpenToAll
}
