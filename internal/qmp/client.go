package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// DefaultGreeting is how long Dial waits for the greeting and the end of the
	// negotiation unless Options say otherwise.
	DefaultGreeting = 5 * time.Second

	// eventBuffer is how many events are kept for a reader that is slow. A guest
	// can cause events, so the number has to be bounded.
	eventBuffer = 64
)

// Options of a connection. The zero value is good for use.
type Options struct {
	MaxMessage int           // bytes, default DefaultMaxMessage
	Greeting   time.Duration // default DefaultGreeting
}

// Client is a connection to one monitor. All methods are safe for concurrent
// use. It owns one goroutine, which Close waits for.
type Client struct {
	conn    net.Conn
	version Version
	events  chan Event
	dropped atomic.Uint64
	done    chan struct{} // closed when the reader has ended, after err is set

	writing sync.Mutex // one command at a time on the wire

	mu      sync.Mutex // guards what follows
	nextID  uint64
	pending map[uint64]chan message
	closing bool
	err     error // why the connection ended; set once
}

// Dial connects to the monitor whose unix socket is at path and negotiates.
//
// The error wraps ErrBusy if the monitor serves somebody else, ErrNotQMP if
// it is something else, fs.ErrNotExist or syscall.ECONNREFUSED if nobody listens,
// and the context's error if that ended first. The context is only for Dial.
func Dial(ctx context.Context, path string, opts Options) (*Client, error) {
	if opts.MaxMessage <= 0 {
		opts.MaxMessage = DefaultMaxMessage
	}
	if opts.Greeting <= 0 {
		opts.Greeting = DefaultGreeting
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("qmp: dial %s: %w", path, err)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, syscall.EAGAIN) {
		// The backlog itself is full, with others that wait.
		err = fmt.Errorf("%w: %w", ErrBusy, err)
	}
	if err != nil {
		return nil, fmt.Errorf("qmp: dial: %w", err)
	}

	c := &Client{
		conn:    conn,
		events:  make(chan Event, eventBuffer),
		done:    make(chan struct{}),
		pending: make(map[uint64]chan message),
	}
	dec := newDecoder(conn, opts.MaxMessage)
	if err := c.negotiate(ctx, dec, opts.Greeting); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("qmp: %s: %w", path, err)
	}
	go c.read(dec)
	return c, nil
}

// negotiate runs before the reader goroutine exists, so it may read itself.
func (c *Client) negotiate(ctx context.Context, dec *decoder, limit time.Duration) error {
	if err := c.conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	m, err := dec.next()
	switch {
	case err == nil && m.kind != kindGreeting:
		return fmt.Errorf("%w: no greeting", ErrNotQMP)
	case errors.Is(err, os.ErrDeadlineExceeded):
		// An explicit cancel says nothing about the monitor; time that ran out does.
		if cause := ctx.Err(); errors.Is(cause, context.Canceled) {
			return cause
		} else if cause != nil {
			return fmt.Errorf("%w: no greeting in time, another client may hold it: %w", ErrBusy, cause)
		}
		return fmt.Errorf("%w: no greeting within %s, another client may hold it", ErrBusy, limit)
	case err != nil:
		return fmt.Errorf("before the greeting: %w", ended(err))
	}
	v := m.greeting.Version
	c.version = Version{Major: v.QEMU.Major, Minor: v.QEMU.Minor, Micro: v.QEMU.Micro, Package: v.Package}

	cmd, err := encode("qmp_capabilities", nil, 0)
	if err != nil {
		return err
	}
	if _, err := c.conn.Write(cmd); err != nil {
		return fmt.Errorf("qmp_capabilities: %w", ctxErr(ctx, err))
	}
	for {
		m, err := dec.next()
		switch {
		case err != nil:
			return fmt.Errorf("qmp_capabilities: %w", ctxErr(ctx, ended(err)))
		case m.kind == kindEvent: // may be sent at any time
			c.deliver(m.event)
			continue
		case m.kind == kindError:
			m.err.Command = "qmp_capabilities"
			return m.err
		case m.kind != kindReturn:
			return fmt.Errorf("%w: second greeting", ErrNotQMP)
		}
		break
	}
	if !stop() {
		return ctx.Err()
	}
	return c.conn.SetDeadline(time.Time{})
}

// ended marks errors of the stream itself, as against those of its content.
func ended(err error) error {
	if errors.Is(err, ErrNotQMP) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrClosed, err)
}

// ctxErr prefers the context's reason over the time-out that it caused.
func ctxErr(ctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return cause
	}
	return err
}

// Version is what the greeting told.
func (c *Client) Version() Version { return c.version }

// Events is where events arrive. It is closed when the connection ends. Events
// that find the channel full are dropped and counted.
func (c *Client) Events() <-chan Event { return c.events }

// Dropped is the number of events lost because nobody took them.
func (c *Client) Dropped() uint64 { return c.dropped.Load() }

// Done is closed when the connection has ended, for example because QEMU did.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended; nil as long as it has not. It always
// wraps ErrClosed.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection and waits for its goroutine. Commands that are
// under way fail with ErrClosed. The guest is left as it is: a paused one stays
// paused. Closing twice is allowed.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Execute runs one command. args is anything that encodes to a JSON object, or
// nil; the answer is decoded into result unless that is nil.
//
// The error is an *Error if QEMU refused, wraps ErrClosed if the connection
// ended, or is the context's. A command that was given up because of its context
// may still be executed by QEMU.
func (c *Client) Execute(ctx context.Context, cmd string, args, result any) error {
	reply := make(chan message, 1)
	id, err := c.register(reply)
	if err != nil {
		return err
	}
	defer c.forget(id)
	line, err := encode(cmd, args, id)
	if err != nil {
		return err
	}
	if err := c.write(ctx, line); err != nil {
		return fmt.Errorf("qmp: %s: %w", cmd, err)
	}
	var m message
	select {
	case m = <-reply:
	case <-ctx.Done():
		return fmt.Errorf("qmp: %s: %w", cmd, ctx.Err())
	case <-c.done:
		// The answer may have come just before the end (quit does that).
		select {
		case m = <-reply:
		default:
			return fmt.Errorf("qmp: %s: %w", cmd, c.Err())
		}
	}
	if m.kind == kindError {
		m.err.Command = cmd
		return m.err
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.ret, result); err != nil {
		return fmt.Errorf("qmp: answer to %s: %w", cmd, err)
	}
	return nil
}

func (c *Client) register(reply chan message) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	if c.closing {
		return 0, ErrClosed
	}
	c.nextID++
	c.pending[c.nextID] = reply
	return c.nextID, nil
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

func (c *Client) write(ctx context.Context, line []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	if err := ctx.Err(); err != nil {
		return err // nothing was sent, the connection is still good
	}
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(expired)
	})
	n, err := c.conn.Write(line)
	if !stop() {
		// The deadline must not outlive this command.
		<-expired
		_ = c.conn.SetWriteDeadline(time.Time{})
	}
	if err == nil {
		return nil
	}
	if n > 0 {
		// Half a command cannot be taken back.
		_ = c.conn.Close()
	}
	if cause := ctx.Err(); cause != nil {
		return cause
	}
	return fmt.Errorf("%w: %w", ErrClosed, err)
}

// read owns the receiving side until the connection ends.
func (c *Client) read(dec *decoder) {
	defer close(c.done)
	defer close(c.events)
	for {
		m, err := dec.next()
		if err == nil && m.kind == kindGreeting {
			err = fmt.Errorf("%w: second greeting", ErrNotQMP)
		}
		if err != nil {
			// Why comes first: whoever finds the connection closed asks for it.
			c.mu.Lock()
			c.err = fmt.Errorf("%w: %w", ErrClosed, err)
			if c.closing {
				c.err = ErrClosed
			}
			c.mu.Unlock()
			_ = c.conn.Close()
			return
		}
		if m.kind == kindEvent {
			c.deliver(m.event)
			continue
		}
		c.mu.Lock()
		reply := c.pending[m.id]
		delete(c.pending, m.id)
		c.mu.Unlock()
		if reply != nil { // nil: its caller gave up
			reply <- m // has room for the one answer
		}
	}
}

func (c *Client) deliver(e Event) {
	select {
	case c.events <- e:
	default:
		c.dropped.Add(1)
	}
}
