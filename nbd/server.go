package nbd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// What a Server uses for fields that are zero.
const (
	DefaultHandshakeTimeout = 30 * time.Second
	DefaultRequestTimeout   = 60 * time.Second
	DefaultWriteTimeout     = 60 * time.Second
	DefaultDrainTimeout     = 10 * time.Second
	DefaultMaxConnections   = 256
	DefaultMaxPerClient     = 64
	DefaultWorkers          = 16
	DefaultMaxInFlight      = 2 * maxPayload
	DefaultMaxRequests      = 256
	DefaultMaxMemory        = 8 * maxPayload
)

// MinMaxMemory is the least that MaxMemory can be, in bytes.
const MinMaxMemory = 2 * maxPayload

// Server serves exports over NBD. The fields must not change once Serve was
// called; it may be called for several listeners at once, which then share
// what is limited. A client, for what is limited per client, is a user at a unix
// socket, or an address on TCP (of IPv6, its network of 64 bits).
type Server struct {
	Exports Exports
	// TLS says how connections are encrypted; nil: they are not (NOTLS).
	TLS *TLS

	// HandshakeTimeout is how long a client may take to choose an export.
	HandshakeTimeout time.Duration
	// RequestTimeout is how long a client may take to send the rest of a
	// request, or the next 64 KiB of it.
	RequestTimeout time.Duration
	// IdleTimeout is how long a client may send no request. Zero is forever: a
	// disk may be silent for days.
	IdleTimeout time.Duration
	// WriteTimeout is how long a client may leave a reply, or 1 MiB of a
	// large one, untaken before it is cut off.
	WriteTimeout time.Duration
	// DrainTimeout is how long requests in progress may take to end once the
	// server is told to stop; then their connections are cut.
	DrainTimeout time.Duration
	// MaxConnections is how many connections there may be, and MaxPerClient how
	// many of one client. When they are there, the next one takes the place of
	// one that has not chosen an export yet, or is turned away.
	MaxConnections int
	MaxPerClient   int
	// Workers is how many slow requests of one connection run at once.
	Workers int
	// MaxInFlight is how many bytes of buffers the slow requests of one
	// connection may hold at once; at least 32 MiB, the largest request.
	MaxInFlight int64
	// MaxRequests is how many slow requests run at once, of all connections, and
	// MaxMemory how many bytes of buffers they may hold; at least 64 MiB. A client
	// gets as much of both as it leaves for others, so half if it is alone. One
	// request of 1 MiB at most runs on every connection beyond that.
	MaxRequests int
	MaxMemory   int64
	// Log gets the errors of disks, with the details that clients are not
	// told, and why connections ended badly. Nil: nothing is logged.
	Log *slog.Logger

	begin   sync.Once
	shares  *shares
	buffers buffers
	crowded seldom
	refused seldom
	busiest atomic.Pointer[unixConn] // had the last request on a unix socket
}

func (s *Server) init() {
	s.shares = &shares{
		maxConns:     or(s.MaxConnections, DefaultMaxConnections),
		maxPerClient: or(s.MaxPerClient, DefaultMaxPerClient),
		maxRequests:  max(or(s.MaxRequests, DefaultMaxRequests), 2),
		maxBytes:     max(or(s.MaxMemory, DefaultMaxMemory), 2*s.buffers.cost(maxPayload)),
		of:           map[string]*share{},
	}
}

// Serve accepts clients from l until ctx ends, and closes l. It returns after
// the last connection: requests in progress are finished and answered, later
// ones are refused with ESHUTDOWN. The error is nil if ctx was the reason.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.begin.Do(s.init)
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		_ = l.Close() // only to wake Accept
	})
	g := &group{conns: map[*conn]struct{}{}}
	// Requests in progress outlive ctx until they are drained.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()

	var watcher sync.WaitGroup
	watcher.Go(func() { s.watch(work, g) })
	defer watcher.Wait()
	defer cancel()

	err := s.accept(ctx, work, l, g)
	if stop() {
		_ = l.Close() // Accept failed and said why
	} else {
		<-closed
	}
	g.drain(or(s.DrainTimeout, DefaultDrainTimeout), cancel)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (s *Server) accept(ctx, work context.Context, l net.Listener, g *group) error {
	var pause time.Duration
	for {
		nc, err := l.Accept()
		if err != nil {
			if !acceptAgain(err) || ctx.Err() != nil {
				return err
			}
			// Out of descriptors, most likely: they come back when clients go.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		c := newConn(s, nc)
		evicted, ok := s.shares.admit(c)
		if !ok {
			s.crowded.log(s.logger(), slog.LevelWarn, "nbd: too many connections, client turned away", "client", c.client)
			_ = nc.Close()
			continue
		}
		if evicted != nil {
			evicted.cutOff(errCrowdedOut)
		}
		g.add(c)
		go func() {
			defer s.shares.leave(c)
			defer g.done(c)
			if err := c.serve(work); err != nil {
				s.logEnd(c, err)
			}
		}()
	}
}

// acceptAgain tells whether Accept may work later.
func acceptAgain(err error) bool {
	var ne interface{ Temporary() bool }
	return errors.As(err, &ne) && ne.Temporary()
}

// logEnd logs why a connection ended badly. What shows an attack, or a mistake
// of those who set up TLS, is worth a warning.
func (s *Server) logEnd(c *conn, err error) {
	if errors.Is(err, ErrTLSRequired) || errors.Is(err, errTLS) || errors.Is(err, errCrowdedOut) || errors.Is(err, ErrRequestTimeout) || errors.Is(err, ErrWriteTimeout) {
		s.refused.log(s.logger(), slog.LevelWarn, "nbd: connection cut off", "client", c.client, "error", err)
		return
	}
	s.logger().Info("nbd: connection ended", "client", c.client, "error", err)
}

func (s *Server) logger() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

// group is the connections of one Serve call, which waits for them.
type group struct {
	mu    sync.Mutex
	conns map[*conn]struct{}
	wait  sync.WaitGroup
}

func (g *group) add(c *conn) {
	g.wait.Add(1)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conns[c] = struct{}{}
}

func (g *group) done(c *conn) {
	g.mu.Lock()
	delete(g.conns, c)
	g.mu.Unlock()
	g.wait.Done()
}

func (g *group) each(f func(*conn)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		f(c)
	}
}

// drain lets all connections finish what they are doing and returns when they
// are gone. After the time given it cancels their reads and cuts them off.
func (g *group) drain(limit time.Duration, cancel func()) {
	g.each((*conn).stop)
	gone := make(chan struct{})
	go func() { defer close(gone); g.wait.Wait() }()
	cut := time.NewTimer(limit)
	defer cut.Stop()
	// Again and again, because some are busy, and one that just enters the
	// transmission phase removes its deadline.
	again := time.NewTicker(min(shutdownGrace, limit))
	defer again.Stop()
	for {
		select {
		case <-gone:
			return
		case <-again.C:
			g.each((*conn).stopReading)
		case <-cut.C:
			cancel()
			g.each((*conn).abort)
			<-gone
			return
		}
	}
}

// or returns v, or what to use if v is zero or less.
func or[T int | int64 | time.Duration](v, otherwise T) T {
	if v <= 0 {
		return otherwise
	}
	return v
}
