package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/tidemark/tidemark/restore"
)

const (
	handshakeBuffer = 4 << 10
	inputBuffer     = 256 << 10 // requests read ahead of their execution
	batchSize       = 256 << 10 // replies gathered before they are sent
)

// ErrProtocol is wrapped when a client broke the protocol in a way that leaves
// nothing but to hang up.
var ErrProtocol = errors.New("protocol violation")

// errStopped ends a connection because the server stops.
var errStopped = errors.New("server stopped")

// conn is one client's connection. One goroutine, the connection's, runs serve;
// it reads the requests and executes those that are quick. Workers, which it
// starts and waits for, execute the others.
type conn struct {
	srv    *Server
	nc     net.Conn
	bye    func() error // closes nc, with TLS's last words
	client Client
	share  *share
	began  time.Time
	in     input
	out    *output

	unix *unixConn // nc while it transmits, if it is that

	stopping atomic.Bool
	decided  atomic.Bool           // an export was chosen
	cause    atomic.Pointer[error] // why the server has cut it off

	// What the handshake agreed on; constant afterwards.
	export     Export
	headers    headers
	contexts   []*statusContext // selected, by ID from 1 on
	size       int64
	flags      uint16 // transmission flags
	disk       restore.Disk
	writable   restore.WritableDisk    // nil: read-only
	cancelable restore.ReaderAtContext // nil: reads cannot be cancelled
	filer      restore.Filer           // nil: no sendfile
	landing    restore.WriteFiler      // nil: writes go through WriteAt

	splicer  *splicer // nil: none yet
	batch    []byte   // replies of the connection's goroutine, not sent yet
	workers  sync.WaitGroup
	busy     atomic.Int64        // running workers
	slots    chan struct{}       // one per running worker
	budget   *semaphore.Weighted // bytes of buffers that workers hold
	inFlight int64               // size of budget
	readCost atomic.Int64        // moving mean of small reads, ns
}

func newConn(s *Server, nc net.Conn) *conn {
	client := clientOf(nc)
	if _, ok := nc.(*net.UnixConn); ok {
		nc = &unixConn{Conn: nc, busiest: &s.busiest}
	}
	c := &conn{srv: s, nc: nc, client: client, began: time.Now(), out: newOutput(nc, or(s.WriteTimeout, DefaultWriteTimeout))}
	c.bye = nc.Close
	c.slots = make(chan struct{}, or(s.Workers, DefaultWorkers))
	c.in = input{from: nc, buf: make([]byte, handshakeBuffer), before: c.flush}
	return c
}

// shutdownGrace is for how long clients are told that the server stops before they
// are hung up on.
const shutdownGrace = 200 * time.Millisecond

// stop makes the connection refuse what still comes.
func (c *conn) stop() { c.stopping.Store(true) }

// stopReading ends the connection after what it is doing, unless workers are busy: then
// it goes on to refuse what comes, and is asked again.
func (c *conn) stopReading() {
	if c.busy.Load() == 0 {
		_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // only fails if it is closed already
	}
}

// abort cuts the connection off.
func (c *conn) abort() { _ = c.nc.Close() }

// cutOff aborts it for a reason.
func (c *conn) cutOff(why error) {
	c.cause.CompareAndSwap(nil, &why)
	c.abort()
}

// serve runs the connection to its end. The error says what was wrong, nil
// after an orderly end. It closes the connection and waits for its workers.
func (c *conn) serve(ctx context.Context) error {
	err := c.run(ctx)
	if cause := c.cause.Load(); cause != nil {
		return *cause
	}
	return err
}

func (c *conn) run(ctx context.Context) error {
	defer func() { _ = c.bye() }() // errors of the stream were seen before
	if err := c.nc.SetReadDeadline(time.Now().Add(or(c.srv.HandshakeTimeout, DefaultHandshakeTimeout))); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer func() {
		for _, s := range c.contexts {
			s.release()
		}
		c.export.release()
	}()
	chosen, err := c.handshake(ctx)
	if err != nil {
		if errors.Is(err, io.EOF) { // port scanners, and clients that only list
			return nil
		}
		return fmt.Errorf("handshake: %w", err)
	}
	if !chosen {
		return nil
	}
	if err := c.nc.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	c.out.ended = cancel                    // what is read for nobody, or waits to be, need not be
	if u, ok := c.in.from.(*unixConn); ok { // and not TLS over it
		if err := u.block(c.out.timeout); err != nil {
			return err
		}
		c.unix = u
		defer c.dropSplicer()
	}
	err = c.transmit(ctx)
	if errors.Is(err, context.Canceled) {
		if failure := c.out.failure(); failure != nil {
			err = failure
		}
	}
	if !errors.Is(err, errStopped) && err != nil {
		cancel() // nobody waits for the reads any more
	}
	c.workers.Wait()
	if errors.Is(err, errStopped) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// flush sends the replies gathered by the connection's goroutine.
func (c *conn) flush() error {
	if len(c.batch) == 0 {
		return nil
	}
	err := c.out.send(c.batch)
	c.batch = c.batch[:0]
	return err
}

// rest prepares for waiting: it sends the replies gathered so far.
func (c *conn) rest() error {
	if c.unix != nil {
		c.unix.working = len(c.slots) > 0
	}
	return c.flush()
}

// reserve makes room for n bytes of replies, n at most batchSize.
func (c *conn) reserve(n int) error {
	if len(c.batch)+n > batchSize {
		return c.flush()
	}
	return nil
}

// spill hands work to a worker that may hold up to n bytes of buffers, and waits
// until there is one and they are free.
func (c *conn) spill(ctx context.Context, n int64, work func(ctx context.Context) error) error {
	n = min(n, c.inFlight)
	select {
	case c.slots <- struct{}{}:
	default:
		if err := c.flush(); err != nil {
			return err
		}
		c.slots <- struct{}{} // workers always end: their replies have deadlines
	}
	if n > 0 && !c.budget.TryAcquire(n) {
		err := c.flush()
		if err == nil {
			err = c.budget.Acquire(ctx, n)
		}
		if err != nil {
			<-c.slots
			return err
		}
	}
	// The first one of a connection may hold a piece that the server's limits do
	// not count, so that nobody is kept waiting by what others hold.
	counted := len(c.slots) > 1 || n > ownPiece
	if counted && !c.srv.shares.tryAcquire(c.share, n) {
		err := c.flush()
		if err == nil {
			err = c.srv.shares.acquire(ctx, c.share, n)
		}
		if err != nil {
			c.budget.Release(n)
			<-c.slots
			return err
		}
	}
	c.busy.Add(1)
	c.workers.Go(func() {
		defer func() {
			c.busy.Add(-1)
			if counted {
				c.srv.shares.release(c.share, n)
			}
			c.budget.Release(n)
			<-c.slots
		}()
		// An error is the connection's end, which output has seen to.
		_ = work(ctx)
	})
	return nil
}

// logDisk records an error of the disk, which the client is not told in full.
func (c *conn) logDisk(what string, r request, err error) {
	if errors.Is(err, context.Canceled) {
		return // the client went away or the server stops
	}
	c.srv.logger().Error("nbd: disk failed", "export", c.export.Name, "request", what,
		"offset", r.off, "length", r.length, "error", err)
}
