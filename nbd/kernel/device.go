package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/nbd"
)

// What Options mean where they are zero.
const (
	DefaultTimeout     = 30 * time.Second
	DefaultDeadConn    = 60 * time.Second
	DefaultConnections = 4
)

// MaxConnections is how many a device may have here; the kernel has no limit.
const MaxConnections = 64

const (
	// negotiateTimeout is how long a server may take to answer a new connection.
	negotiateTimeout = 30 * time.Second
	// lookEvery is how often a device is looked at besides when an event tells to.
	lookEvery = time.Second
	// silentLooks is at how many of them in a row a device must be dead in silence to count as detached. The
	// event comes at once if it is not.
	silentLooks = 3
	// guardWait is how long whoever had looked after a device may take to see that it was detached.
	guardWait = 2 * silentLooks * lookEvery
	// redialFirst and redialMost bound the time between attempts to reach a server that is gone.
	redialFirst, redialMost = 100 * time.Millisecond, time.Second
	// pageSize is the kernel's largest logical block here.
	pageSize = 4096
)

// ErrGeometry is wrapped when the kernel can't show an export as it is: its block size is too large, it
// is empty, or another one than before has come in its place.
var ErrGeometry = errors.New("this export can't be a block device")

// Options say what is attached where.
type Options struct {
	Index  int // of the device; -1: one that is free
	Dial   func(context.Context) (net.Conn, error)
	Export string

	// Connections is how many there are, if the server says that several may be used.
	Connections int
	ReadOnly    bool // also where the export can be written

	// Timeout is how long a request may take before its connection counts as dead. Whole seconds, at
	// least 1.
	Timeout time.Duration
	// DeadConn is how long requests wait for a server that is gone before they fail. Whole seconds.
	DeadConn time.Duration

	// Backend names what is attached, for others to see in /sys/block/nbdN/backend. If it is not empty and
	// the device is attached already to something of that name whose connections are all dead,
	// it is taken over: the process that had attached it was killed, most likely.
	Backend string

	// Note is told, in a line, what a person should know. It must not block.
	Note func(string)
}

// Device is an attached device. Close it, or Detach it before.
type Device struct {
	o     Options
	ctl   *control
	guard net.Listener

	index     int
	remote    nbd.Remote
	blockSize uint32
	links     []link
	backend   string // as the kernel has it
	resumed   bool

	events <-chan int
	stop   func() // ends events
}

// Attach makes a device of an export. Errors wrap [ErrNoDriver], [ErrPermission], [ErrBusy],
// [ErrGeometry], or are those of Dial and [nbd.Negotiate].
func Attach(ctx context.Context, o Options) (_ *Device, err error) {
	if o.Timeout, o.DeadConn = or(o.Timeout, DefaultTimeout), or(o.DeadConn, DefaultDeadConn); o.Note == nil {
		o.Note = func(string) {}
	}
	if o.Connections <= 0 {
		o.Connections = DefaultConnections
	}
	d := &Device{o: o, index: o.Index}
	if d.ctl, err = dialControl(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if err := d.watch(ctx); err != nil {
		return nil, err
	}
	if err := d.dialAll(ctx); err != nil {
		return nil, err
	}
	if d.blockSize, err = blockSize(d.remote); err != nil {
		return nil, err
	}
	return d, d.connect(ctx)
}

func or(v, otherwise time.Duration) time.Duration {
	if v <= 0 {
		return otherwise
	}
	return v
}

func (d *Device) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	events, wait, err := d.ctl.watch(ctx)
	if err != nil {
		cancel()
		return err
	}
	d.events, d.stop = events, func() { cancel(); wait() }
	return nil
}

// dialAll makes the first connection, and as many more as the server lets clients use.
func (d *Device) dialAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, negotiateTimeout)
	defer cancel()
	first, err := d.o.negotiate(ctx)
	if err != nil {
		return err
	}
	d.remote, d.links = first.remote, []link{first}
	n := 1
	if d.remote.MultiConn {
		n = min(d.o.Connections, MaxConnections)
	}
	more := make([]link, n-1)
	g, ctx := errgroup.WithContext(ctx)
	for i := range more {
		g.Go(func() error {
			l, err := d.o.negotiate(ctx)
			if err == nil {
				more[i] = l
				err = d.same(l.remote)
			}
			return err
		})
	}
	err = g.Wait()
	for _, l := range more {
		if l.file != nil {
			d.links = append(d.links, l)
		}
	}
	return err
}

// same tells whether a new connection leads to the export that is attached, as far as can be seen. It
// may have grown.
func (d *Device) same(r nbd.Remote) error {
	if r.Size < d.remote.Size || r.Flags != d.remote.Flags {
		return fmt.Errorf("%w: it has %d bytes and flags %#x, and had %d and %#x", ErrGeometry, r.Size, r.Flags, d.remote.Size, d.remote.Flags)
	}
	return nil
}

// blockSize is the logical block of the device, in bytes.
func blockSize(r nbd.Remote) (uint32, error) {
	n := max(r.MinBlock, 512)
	switch {
	case n > pageSize:
		return 0, fmt.Errorf("%w: the server takes blocks of %d bytes only, the kernel has at most %d", ErrGeometry, n, pageSize)
	case r.Size < int64(n):
		return 0, fmt.Errorf("%w: it has %d bytes", ErrGeometry, r.Size)
	}
	return n, nil
}

// sockets are those of links.
func sockets(links []link) []*os.File {
	var list []*os.File
	for _, l := range links {
		list = append(list, l.file)
	}
	return list
}

func (d *Device) connect(ctx context.Context) error {
	flags := d.remote.Flags
	if d.o.ReadOnly {
		flags |= 1 << 1 // NBD_FLAG_READ_ONLY
	}
	if d.o.Backend != "" {
		d.backend = withConnections(d.o.Backend, len(d.links))
	}
	index, err := d.ctl.connect(setup{
		index: d.index, sockets: sockets(d.links), size: d.remote.Size, blockSize: d.blockSize, flags: flags,
		timeout: d.o.Timeout, deadConn: d.o.DeadConn, backend: d.backend,
	})
	if errors.Is(err, ErrBusy) && d.index >= 0 {
		if n := connectionsOf(d.index, d.o.Backend); n > 0 {
			if err := d.guardIt(ctx); err != nil {
				return err
			}
			return d.resume(ctx, n)
		}
	}
	if err != nil {
		if d.index >= 0 {
			err = fmt.Errorf("%s: %w", Path(d.index), err)
		}
		return err
	}
	d.index = index
	if err := d.guardIt(ctx); err != nil {
		return errors.Join(err, d.ctl.disconnect(index))
	}
	return nil
}

// guardIt takes the lock of who looks after the device. It is a name that goes with the process.
func (d *Device) guardIt(ctx context.Context) (err error) {
	var lc net.ListenConfig
	for until := time.Now().Add(guardWait); ; {
		d.guard, err = lc.Listen(ctx, "unix", fmt.Sprintf("@tidemark-attach-nbd%d", d.index))
		if err == nil {
			return nil
		}
		if time.Now().After(until) || ctx.Err() != nil {
			d.guard = nil
			return fmt.Errorf("%s: %w: another process looks after it: %w", Path(d.index), ErrBusy, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(lookEvery / 10):
		}
	}
}

// resume takes over a device whose connections are all dead.
func (d *Device) resume(ctx context.Context, want int) error {
	d.backend = withConnections(d.o.Backend, want)
	if want > 1 && !d.remote.MultiConn {
		return fmt.Errorf("%s: %w with %d connections, and the server lets clients use one", Path(d.index), ErrBusy, want)
	}
	for len(d.links) > want {
		d.links[len(d.links)-1].close()
		d.links = d.links[:len(d.links)-1]
	}
	for len(d.links) < want {
		l, err := d.o.negotiate(ctx)
		if err != nil {
			return err
		}
		d.links = append(d.links, l)
	}
	if err := d.ctl.reconnect(d.index, 0, sockets(d.links), d.backend); err != nil {
		return fmt.Errorf("%s: %w: take it over: %w", Path(d.index), ErrBusy, err)
	}
	for _, l := range d.links {
		if !l.taken() {
			return fmt.Errorf("%s: %w, and it has connections that work", Path(d.index), ErrBusy)
		}
	}
	d.resumed = true
	return nil
}

// Available tells whether devices can be attached here. Errors wrap [ErrNoDriver].
func Available() error {
	c, err := dialControl()
	if err != nil {
		return err
	}
	return c.Close()
}

// InUse tells whether the device is mounted, or part of another one.
func (d *Device) InUse() (bool, error) { return InUse(d.index) }

// Path is the device's name in /dev.
func (d *Device) Path() string { return Path(d.index) }

// Size is the device's size in bytes.
func (d *Device) Size() int64 { return d.remote.Size - d.remote.Size%int64(d.blockSize) }

// BlockSize is the logical block size in bytes.
func (d *Device) BlockSize() int { return int(d.blockSize) }

// Connections is how many connections it has.
func (d *Device) Connections() int { return len(d.links) }

// ReadOnly tells whether it can't be written to.
func (d *Device) ReadOnly() bool { return d.remote.ReadOnly || d.o.ReadOnly }

// Resumed tells whether it was attached before and was taken over.
func (d *Device) Resumed() bool { return d.resumed }

// Keep replaces connections that die, until ctx ends, whose error it returns, or the device is detached by
// somebody: then it returns nil. A server that is gone is tried again for as long as the device is there.
func (d *Device) Keep(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	died := false // without having been told to
	silent := 0   // looks at which all were dead, and nobody said that they died
	wait, said := redialFirst, ""
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case index := <-d.events:
			died = died || index == d.index || index < 0
		case <-tick.C:
			if silent++; died || !d.allDead() {
				silent = 0
			}
		}
		// Somebody else may have attached it again since.
		if d.gone() || silent >= silentLooks {
			return nil
		}
		for died && d.firstDead() >= 0 {
			err := d.replace(ctx, d.firstDead())
			if err == nil {
				wait, said = redialFirst, ""
				continue
			}
			if text := err.Error(); text != said && ctx.Err() == nil {
				d.o.Note(fmt.Sprintf("%s: the server can't be reached, trying again: %s", d.Path(), text))
				said = text
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(wait):
			}
			wait = min(2*wait, redialMost)
			if d.gone() {
				return nil
			}
		}
		died = died && d.firstDead() >= 0
	}
}

// gone tells whether the device is detached. If that can't be told it is not: the next look will tell.
func (d *Device) gone() bool {
	there, err := d.ctl.connected(d.index)
	return err == nil && !there
}

// allDead tells whether the driver has given up all links.
func (d *Device) allDead() bool {
	return !slices.ContainsFunc(d.links, func(l link) bool { return !l.dead() })
}

// firstDead is the first link that is dead, -1 if there is none.
func (d *Device) firstDead() int {
	for i, l := range d.links {
		if l.dead() {
			return i
		}
	}
	return -1
}

var errNotTaken = errors.New("the kernel does not take a new connection yet")

// replace makes a connection in the place of link i.
func (d *Device) replace(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, negotiateTimeout)
	defer cancel()
	l, err := d.o.negotiate(ctx)
	if err != nil {
		return err
	}
	err = d.same(l.remote)
	var size int64
	if err == nil {
		if l.remote.Size > d.remote.Size {
			size = l.remote.Size - l.remote.Size%int64(d.blockSize)
		}
		err = d.ctl.reconnect(d.index, size, []*os.File{l.file}, d.backend)
	}
	if err == nil && !l.taken() {
		err = errNotTaken
	}
	if err != nil {
		l.close()
		return err
	}
	d.links[i].close()
	d.links[i] = l
	if size > 0 {
		d.remote.Size = l.remote.Size
		d.o.Note(fmt.Sprintf("%s: it has grown to %d bytes", d.Path(), d.Size()))
	}
	if d.firstDead() < 0 {
		d.o.Note(d.Path() + ": connected again")
	}
	return nil
}

// Detach makes what was written durable on the server, detaches the device and closes d.
func (d *Device) Detach() error { return errors.Join(detach(d.ctl, d.index, false), d.Close()) }

// Close lets go of the device, which stays attached.
func (d *Device) Close() error {
	var err error
	if d.stop != nil {
		d.stop()
	}
	for _, l := range d.links {
		l.close()
	}
	if d.guard != nil {
		err = d.guard.Close()
	}
	return errors.Join(err, d.ctl.Close())
}

// Detach detaches a device, whoever attached it. Without force it makes what was written durable
// first, which takes as long as the server does, and fails if that fails. Errors wrap [ErrNoDriver],
// [ErrPermission] and [ErrNotAttached].
func Detach(index int, force bool) (err error) {
	c, err := dialControl()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	there, err := c.connected(index)
	switch {
	case errors.Is(err, ErrPermission):
		return err
	case err != nil || !there:
		return fmt.Errorf("%s: %w", Path(index), ErrNotAttached)
	}
	return detach(c, index, force)
}

func detach(c *control, index int, force bool) error {
	if !force {
		if err := flush(Path(index)); err != nil {
			return err
		}
	}
	if err := c.disconnect(index); err != nil {
		return fmt.Errorf("%s: %w", Path(index), err)
	}
	return nil
}

// flush writes back the page cache of a device and has the server flush its own.
func flush(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
