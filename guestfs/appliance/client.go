package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// client asks an appliance.
type client struct {
	conn net.Conn

	writing sync.Mutex

	mu      sync.Mutex
	pending map[uint64]chan []byte
	id      uint64
	err     error         // why nothing can be asked any more
	failed  chan struct{} // closed with err
}

// How long an appliance may take, before it is taken for hung. Mounts replay journals.
const (
	answerTime = 60 * time.Second
	mountTime  = 5 * time.Minute
)

func newClient(conn net.Conn) *client {
	return &client{conn: conn, pending: map[uint64]chan []byte{}, failed: make(chan struct{})}
}

// hello waits for the appliance's first frame.
func (c *client) hello() error {
	id, body, err := readFrame(c.conn)
	if err == nil && (id != 0 || string(body) != version) {
		err = fmt.Errorf("%w: hello %.40q", errWire, body)
	}
	return err
}

// receive hands out answers until the connection ends.
func (c *client) receive() {
	for {
		id, body, err := readFrame(c.conn)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("it has ended")
			}
			c.fail(err)
			return
		}
		c.mu.Lock()
		to := c.pending[id]
		delete(c.pending, id)
		c.mu.Unlock()
		if to != nil { // else the asker has gone
			to <- body
		}
	}
}

// fail ends all that wait, for this reason, and the connection.
func (c *client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.failed)
		_ = c.conn.Close()
	}
}

// ask sends a request and waits for the answer's content.
func (c *client) ask(ctx context.Context, r *request, limit time.Duration) ([]byte, error) {
	to := make(chan []byte, 1)
	c.mu.Lock()
	c.id++
	id := c.id
	c.pending[id] = to
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
	}()
	c.writing.Lock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(limit))
	err := writeFrame(c.conn, id, r.encode())
	c.writing.Unlock()
	if err != nil {
		c.fail(err)
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case body := <-to:
		out, err := answer(body, r)
		if errors.Is(err, errWire) {
			c.fail(err)
			return nil, c.lost()
		}
		return out, err
	case <-c.failed:
		return nil, c.lost()
	case <-timer.C:
		c.fail(fmt.Errorf("it did not answer within %v (volume %s)", limit, r.volume))
		return nil, c.lost()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// errClient marks failures of the appliance, not of what was asked.
var errClient = errors.New("connection lost")

func (c *client) lost() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Errorf("%w: %w", errClient, c.err)
}
