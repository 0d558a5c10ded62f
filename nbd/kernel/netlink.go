package kernel

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Numbers of include/uapi/linux/nbd-netlink.h.
const (
	familyName = "nbd"
	groupName  = "nbd_mc_group"
	version    = 1

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4
	cmdStatus      = 5

	attrIndex       = 1
	attrSize        = 2 // bytes
	attrBlockSize   = 3 // bytes
	attrTimeout     = 4 // seconds
	attrServerFlags = 5
	attrSockets     = 7
	attrDeadConn    = 8 // seconds
	attrDeviceList  = 9
	attrBackend     = 10

	attrSocketItem = 1
	attrSocketFD   = 1

	attrDeviceItem      = 1
	attrDeviceIndex     = 1
	attrDeviceConnected = 2
)

// Errors of this package.
var (
	// ErrNoDriver is wrapped when the kernel has no NBD client, or it is not loaded.
	ErrNoDriver = errors.New("the kernel's nbd driver is not loaded")
	// ErrPermission is wrapped when the caller is not root (CAP_SYS_ADMIN).
	ErrPermission = errors.New("not permitted")
	// ErrBusy is wrapped when the device is attached already.
	ErrBusy = errors.New("the device is attached already")
	// ErrNotAttached is wrapped when the device is not attached.
	ErrNotAttached = errors.New("the device is not attached")
)

// control talks to the driver. Its methods may be called by many goroutines.
type control struct {
	conn   *genetlink.Conn
	family genetlink.Family
}

func dialControl() (*control, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, err
	}
	c, err := newControl(conn)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

func newControl(conn *genetlink.Conn) (*control, error) {
	f, err := conn.GetFamily(familyName)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, ErrNoDriver
	case err != nil:
		return nil, fmt.Errorf("netlink family %s: %w", familyName, err)
	case f.Version < version:
		return nil, fmt.Errorf("%w: version %d of its netlink interface", ErrNoDriver, f.Version)
	}
	return &control{conn, f}, nil
}

func (c *control) Close() error { return c.conn.Close() }

// ask sends a command that has an answer. No acknowledgement is asked for besides: it would come later, and
// be taken for the answer to the next command.
func (c *control) ask(cmd uint8, fill func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	return c.execute(cmd, netlink.Request, fill)
}

// tell sends a command that has none.
func (c *control) tell(cmd uint8, fill func(*netlink.AttributeEncoder)) error {
	_, err := c.execute(cmd, netlink.Request|netlink.Acknowledge, fill)
	return err
}

func (c *control) execute(cmd uint8, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	e := netlink.NewAttributeEncoder()
	fill(e)
	body, err := e.Encode()
	if err != nil {
		return nil, err
	}
	m := genetlink.Message{Header: genetlink.Header{Command: cmd, Version: version}, Data: body}
	answers, err := c.conn.Execute(m, c.family.ID, flags)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		err = fmt.Errorf("%w: %w", ErrPermission, err)
	}
	return answers, err
}

// setup is what a device is made of.
type setup struct {
	index     int // -1: one that is free
	sockets   []*os.File
	size      int64
	blockSize uint32
	flags     uint16 // transmission flags
	timeout   time.Duration
	deadConn  time.Duration
	backend   string // "": none; since Linux 5.14
}

// connect attaches a device and returns its index. Errors wrap ErrBusy.
func (c *control) connect(s setup) (int, error) {
	answers, err := c.ask(cmdConnect, func(e *netlink.AttributeEncoder) {
		if s.index >= 0 {
			e.Uint32(attrIndex, uint32(s.index))
		}
		e.Uint64(attrSize, uint64(s.size))
		e.Uint64(attrBlockSize, uint64(s.blockSize))
		e.Uint64(attrTimeout, seconds(s.timeout))
		e.Uint64(attrDeadConn, seconds(s.deadConn))
		e.Uint64(attrServerFlags, uint64(s.flags))
		encodeSockets(e, s.sockets)
		if s.backend != "" {
			e.String(attrBackend, s.backend)
		}
	})
	switch {
	case errors.Is(err, unix.EBUSY):
		return 0, fmt.Errorf("%w: %w", ErrBusy, err)
	case err != nil:
		return 0, err
	}
	return decodeIndex(answers)
}

// reconnect gives a device that is attached sockets in the place of dead ones. If it has fewer dead ones
// those that are too many are ignored, without an error. A size of 0 leaves it as it is.
func (c *control) reconnect(index int, size int64, sockets []*os.File, backend string) error {
	return c.tell(cmdReconfigure, func(e *netlink.AttributeEncoder) {
		e.Uint32(attrIndex, uint32(index))
		if size > 0 {
			e.Uint64(attrSize, uint64(size))
		}
		encodeSockets(e, sockets)
		if backend != "" {
			e.String(attrBackend, backend)
		}
	})
}

// disconnect detaches a device. Errors wrap ErrNotAttached.
func (c *control) disconnect(index int) error {
	err := c.tell(cmdDisconnect, func(e *netlink.AttributeEncoder) { e.Uint32(attrIndex, uint32(index)) })
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", ErrNotAttached, err)
	}
	return err
}

// connected tells whether a device is attached, or still held open after it was detached.
func (c *control) connected(index int) (bool, error) {
	answers, err := c.ask(cmdStatus, func(e *netlink.AttributeEncoder) { e.Uint32(attrIndex, uint32(index)) })
	if err != nil {
		return false, err
	}
	found, err := decodeStatus(answers)
	return found[uint32(index)], err
}

// seconds rounds up, so that little does not become the kernel's "never".
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

func encodeSockets(e *netlink.AttributeEncoder, sockets []*os.File) {
	e.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, s := range sockets {
			list.Nested(attrSocketItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(attrSocketFD, uint32(s.Fd()))
				return nil
			})
		}
		return nil
	})
}

var errAnswer = errors.New("the kernel's answer is not understood")

// decodeIndex finds the index in the answer to a connect.
func decodeIndex(answers []genetlink.Message) (int, error) {
	index := -1
	for _, m := range answers {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return 0, fmt.Errorf("%w: %w", errAnswer, err)
		}
		for d.Next() {
			if d.Type() == attrIndex {
				if n := d.Uint32(); n <= math.MaxInt32 {
					index = int(n)
				}
			}
		}
		if err := d.Err(); err != nil {
			return 0, fmt.Errorf("%w: %w", errAnswer, err)
		}
	}
	if index < 0 {
		return 0, fmt.Errorf("%w: no index in it", errAnswer)
	}
	return index, nil
}

// decodeStatus finds which devices are connected.
func decodeStatus(answers []genetlink.Message) (map[uint32]bool, error) {
	connected := map[uint32]bool{}
	item := func(d *netlink.AttributeDecoder) error {
		var index uint32
		var is bool
		for d.Next() {
			switch d.Type() {
			case attrDeviceIndex:
				index = d.Uint32()
			case attrDeviceConnected:
				is = d.Uint8() != 0
			}
		}
		connected[index] = is
		return d.Err()
	}
	list := func(d *netlink.AttributeDecoder) error {
		for d.Next() {
			if d.Type() == attrDeviceItem {
				d.Nested(item)
			}
		}
		return d.Err()
	}
	for _, m := range answers {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errAnswer, err)
		}
		for d.Next() {
			if d.Type() == attrDeviceList {
				d.Nested(list)
			}
		}
		if err := d.Err(); err != nil {
			return nil, fmt.Errorf("%w: %w", errAnswer, err)
		}
	}
	return connected, nil
}

// watch yields the indexes of devices that have lost a connection they did not mean to, until ctx
// ends; -1 says that events were lost. The returned function waits for the end.
func (c *control) watch(ctx context.Context) (<-chan int, func(), error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, nil, err
	}
	joined := false
	for _, g := range c.family.Groups {
		if g.Name == groupName {
			if err := conn.JoinGroup(g.ID); err != nil {
				return nil, nil, errors.Join(fmt.Errorf("events of the nbd driver: %w", err), conn.Close())
			}
			joined = true
		}
	}
	if !joined {
		return nil, nil, errors.Join(fmt.Errorf("%w: it has no events", ErrNoDriver), conn.Close())
	}
	events := make(chan int)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer stop()
		defer func() { _ = conn.Close() }() // only read from
		for {
			answers, _, err := conn.Receive()
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				answers = nil
				select { // not in a tight loop, whatever it is
				case <-ctx.Done():
					return
				case <-time.After(100 * time.Millisecond):
				}
			}
			for _, index := range deadLinks(answers, err) {
				select {
				case events <- index:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return events, func() { <-done }, nil
}

// deadLinks are the devices that events speak of.
func deadLinks(events []genetlink.Message, err error) []int {
	if err != nil {
		return []int{-1}
	}
	var list []int
	for _, m := range events {
		if m.Header.Command != cmdLinkDead {
			continue
		}
		if index, err := decodeIndex([]genetlink.Message{m}); err == nil {
			list = append(list, index)
		}
	}
	return list
}
