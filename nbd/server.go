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
	DefaultWriteTimeout     = 60 * time.Second
	DefaultDrainTimeout     = 10 * time.Second
	DefaultMaxConnections   = 128
	DefaultWorkers          = 16
	DefaultMaxInFlight      = 2 * maxPayload
)

// Server serves exports over NBD. The fields must not change once Serve was
// called; it may be called for several listeners at once, which then share
// MaxConnections.
type Server struct {
	Exports Exports

	// HandshakeTimeout is how long a client may take to choose an export.
	HandshakeTimeout time.Duration
	// WriteTimeout is how long a client may leave a reply, or 1 MiB of a
	// large one, untaken before it is cut off.
	WriteTimeout time.Duration
	// DrainTimeout is how long requests in progress may take to end once the
	// server is told to stop; then their connections are cut.
	DrainTimeout time.Duration
	// MaxConnections is how many clients there may be; more are turned away.
	MaxConnections int
	// Workers is how many slow requests of one connection run at once.
	Workers int
	// MaxInFlight is how many bytes of buffers the slow requests of one
	// connection may hold at once; at least 32 MiB, the largest request.
	MaxInFlight int64
	// Log gets the errors of disks, with the details that clients are not
	// told, and why connections ended badly. Nil: nothing is logged.
	Log *slog.Logger

	conns   atomic.Int64
	buffers buffers
	busiest atomic.Pointer[unixConn]
}

// Serve accepts clients from l until ctx ends, and closes l. It returns after
// the last connection: requests in progress are finished and answered, later
// ones are refused with ESHUTDOWN. The error is nil if ctx was the reason.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		_ = l.Close() // only to wake Accept
	})
	g := &group{conns: map[*conn]struct{}{}}
	// Requests in progress outlive ctx until they are drained.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
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
		if s.conns.Add(1) > int64(or(s.MaxConnections, DefaultMaxConnections)) {
			s.conns.Add(-1)
			s.logger().Warn("nbd: too many connections, client turned away", "client", nc.RemoteAddr())
			_ = nc.Close()
			continue
		}
		c := newConn(s, nc)
		g.add(c)
		go func() {
			defer s.conns.Add(-1)
			defer g.done(c)
			if err := c.serve(work); err != nil {
				s.logger().Info("nbd: connection ended", "client", nc.RemoteAddr(), "error", err)
			}
		}()
	}
}

// acceptAgain tells whether Accept may work later.
func acceptAgain(err error) bool {
	var ne interface{ Temporary() bool }
	return errors.As(err, &ne) && ne.Temporary()
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
	cut := make(chan struct{})
	timer := time.AfterFunc(limit, func() {
		defer close(cut)
		cancel()
		g.each((*conn).abort)
	})
	g.wait.Wait()
	if !timer.Stop() {
		<-cut
	}
}

// or returns v, or what to use if v is zero or less.
func or[T int | int64 | time.Duration](v, otherwise T) T {
	if v <= 0 {
		return otherwise
	}
	return v
}
