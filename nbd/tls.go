package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// ErrTLSRequired ends connections of clients that choose an export in plain
// text, in the one way that knows no error reply.
var ErrTLSRequired = errors.New("client does not use TLS, which is required")

// errTLS is wrapped when the client and the server do not come to terms.
var errTLS = errors.New("TLS")

// TLS makes a server offer encryption, section "TLS support".
type TLS struct {
	// Required answers every option before TLS with an error (FORCEDTLS). Else
	// a client may stay with plain text (SELECTIVETLS), and so may whoever sits
	// between it and the server.
	Required bool

	// Config is asked for each handshake, so that certificates can be renewed
	// while the server runs. Clients that its ClientAuth verifies become
	// [Client.Certificate].
	Config func() (*tls.Config, error)
}

// startTLS answers NBD_OPT_STARTTLS.
func (n *negotiation) startTLS(ctx context.Context, data []byte) error {
	switch {
	case len(data) > 0:
		n.refuse(optStartTLS, repErrInvalid, "option takes no data")
		return nil
	case n.srv.TLS == nil:
		// Section "NOTLS mode": the option is not implemented at all.
		n.refuse(optStartTLS, repErrUnsupported, "this server has no TLS")
		return nil
	case n.client.TLS:
		n.refuse(optStartTLS, repErrInvalid, "TLS is in use already")
		return nil
	case n.in.r != n.in.w:
		// A client waits for the acknowledgement. What came behind the option is
		// somebody else's, who wants it to be taken for the client's.
		return fmt.Errorf("%w: plain text behind STARTTLS", ErrProtocol)
	}
	config, err := n.srv.TLS.Config()
	if err != nil {
		n.srv.logger().Error("nbd: TLS is not available", "error", err)
		n.refuse(optStartTLS, repErrPolicy, "TLS is not available")
		return nil
	}
	n.reply(optStartTLS, repAck, nil)
	if err := n.flush(); err != nil {
		return err
	}
	return n.encrypt(ctx, config)
}

// encrypt shakes hands. Nothing that was agreed on in plain text is kept: it
// may have been somebody else's wish.
func (n *negotiation) encrypt(ctx context.Context, config *tls.Config) error {
	c := n.conn
	under := &gathering{Conn: c.nc, timeout: or(c.srv.WriteTimeout, DefaultWriteTimeout)}
	over := tls.Server(under, config)
	if err := over.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("%w: %w", errTLS, err)
	}
	c.in.from = over
	c.out = newTLSOutput(over, under)
	c.bye = over.Close
	c.client.TLS = true
	if s := over.ConnectionState(); len(s.VerifiedChains) > 0 {
		c.client.Certificate = s.PeerCertificates[0]
	}
	n.forgetContexts()
	c.headers = simpleHeaders
	*n = negotiation{conn: c, noZeroes: n.noZeroes}
	return nil
}

// needsTLS tells whether an option must be refused because TLS has to come
// first. Section "FORCEDTLS mode".
func (n *negotiation) needsTLS(option uint32) bool {
	return n.srv.TLS != nil && n.srv.TLS.Required && !n.client.TLS && option != optStartTLS && option != optAbort
}

func (n *negotiation) refuseWithoutTLS(option uint32) {
	n.refuse(option, repErrTLSRequired, "this server requires TLS")
}

// gathering is a connection that TLS writes its records to. It sees to the write
// deadline: TLS writes on behalf of reads too, when it is asked for new keys.
type gathering struct {
	net.Conn
	timeout time.Duration

	mu     sync.Mutex
	closes bool // TLS has set the deadline that it wants for its last words
	armed  time.Time
}

func (g *gathering) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := time.Now(); !g.closes && now.Sub(g.armed) >= g.timeout/4 {
		g.armed = now
		if err := g.Conn.SetWriteDeadline(now.Add(g.timeout)); err != nil {
			return 0, err
		}
	}
	return g.Conn.Write(p)
}

func (g *gathering) SetWriteDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closes = true
	return g.Conn.SetWriteDeadline(t)
}
