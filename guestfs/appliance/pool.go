package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/restore"
)

// Config says how appliances are made. The zero value will do.
type Config struct {
	Kernel    string        // "VMLINUZ" or "VMLINUZ:MODULESDIR"; empty: the host's newest that fits
	Program   string        // what becomes /init, linked statically; empty: this process' own
	Accel     string        // "kvm" or "tcg"; empty: kvm where it works
	MemoryMiB int           // of one appliance; 0: 512
	Idle      time.Duration // after which an appliance that is not used ends; 0: 5 minutes
	Most      int           // that run at once; 0: 4
	Log       *slog.Logger  // gets why appliances ended; may be nil
}

// Pool starts appliances when they are needed, and ends those that are not. It is safe for concurrent use.
type Pool struct {
	config Config
	ctx    context.Context //nolint:containedctx // of the machines, not of who asked first
	cancel context.CancelFunc
	wait   sync.WaitGroup

	parts struct {
		sync.Mutex
		image, initrd *os.File
		accel         string
	}

	mu      sync.Mutex
	named   map[string]*Disk
	disks   map[*Disk]bool // that have a machine or start one
	changed chan struct{}  // closed and made anew when one gets free
	closed  bool
}

// NewPool makes a pool, to be closed. It starts nothing yet.
func NewPool(c Config) *Pool {
	if c.Idle <= 0 {
		c.Idle = 5 * time.Minute
	}
	if c.Most <= 0 {
		c.Most = 4
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	p := &Pool{config: c, named: map[string]*Disk{}, disks: map[*Disk]bool{}, changed: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.wait.Go(p.endIdle)
	return p
}

// Close ends all appliances. Whoever waits for one gets an error.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	p.wait.Wait()
	p.mu.Lock()
	var left []*machine
	for d := range p.disks {
		left = append(left, p.detach(d))
	}
	p.mu.Unlock()
	for _, m := range left {
		m.end()
	}
	p.parts.Lock()
	defer p.parts.Unlock()
	var err error
	for _, f := range []*os.File{p.parts.image, p.parts.initrd} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	p.parts.image, p.parts.initrd = nil, nil
	return err
}

// Opener opens the disk for one appliance, and what closes it.
type Opener func(ctx context.Context) (restore.Disk, io.Closer, error)

// Disk shows the files of a disk. Nothing starts before the first question, and a disk that is
// not asked for some time costs nothing.
type Disk struct {
	pool *Pool
	open Opener

	// Under pool.mu.
	machine  *machine
	closer   io.Closer
	starting chan struct{} // closed when the start is over; nil: none
	startErr error         // of the last start
	users    int
	used     time.Time
	failures int       // since the last answer
	failedAt time.Time // the last
	why      error
	volumes  []guestfs.Volume
}

var _ guestfs.Files = (*Disk)(nil)

// Disk is the files of the disk that identity names for good. It need not be closed.
func (p *Pool) Disk(identity string, open Opener) *Disk {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.named[identity]
	if d == nil {
		d = &Disk{pool: p, open: open}
		p.named[identity] = d
	}
	return d
}

// detach takes a disk's machine away from it. The caller has p.mu, and ends the machine without.
func (p *Pool) detach(d *Disk) *machine {
	m := d.machine
	if m != nil {
		m.closer = d.closer
	}
	d.machine, d.closer = nil, nil
	delete(p.disks, d)
	p.signal()
	return m
}

// end closes the machine, and the disk below it.
func (m *machine) end() {
	if m == nil {
		return
	}
	m.close()
	_ = m.closer.Close() // it was only read
}

// signal wakes who waits for a change. The caller has p.mu.
func (p *Pool) signal() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// endIdle ends machines that nobody has used for a while.
func (p *Pool) endIdle() {
	tick := time.NewTicker(max(p.config.Idle/4, 10*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-tick.C:
		}
		p.mu.Lock()
		var idle []*machine
		for d := range p.disks {
			if d.machine != nil && d.users == 0 && time.Since(d.used) >= p.config.Idle {
				idle = append(idle, p.detach(d))
			}
		}
		p.mu.Unlock()
		for _, m := range idle {
			m.end()
		}
	}
}

// Running is how many appliances there are, those that start included.
func (p *Pool) Running() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.disks)
}

// Failures of an appliance after which a disk is left alone for a while.
const (
	mostFailures = 3
	restTime     = time.Minute
)

// acquire gives a machine that runs, to be released.
func (d *Disk) acquire(ctx context.Context) (*machine, error) {
	p := d.pool
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, fmt.Errorf("%w: it was stopped", guestfs.ErrLost)
		}
		if d.machine != nil {
			d.users++
			d.used = time.Now()
			m := d.machine
			p.mu.Unlock()
			return m, nil
		}
		if d.failures >= mostFailures && time.Since(d.failedAt) < restTime {
			err := fmt.Errorf("%w %d times, and is not started again for %v: %w", guestfs.ErrLost, d.failures, restTime, d.why)
			p.mu.Unlock()
			return nil, err
		}
		wait := d.starting
		if wait == nil && len(p.disks) >= p.config.Most {
			var oldest *Disk
			for o := range p.disks {
				if o.machine != nil && o.users == 0 && (oldest == nil || o.used.Before(oldest.used)) {
					oldest = o
				}
			}
			if oldest != nil {
				m := p.detach(oldest)
				p.mu.Unlock()
				m.end()
				continue
			}
			wait = p.changed // all are busy
		} else if wait == nil {
			wait = make(chan struct{})
			d.starting = wait
			p.disks[d] = true
			p.wait.Go(func() { d.start(wait) })
		}
		mine := wait == d.starting
		p.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if mine {
			p.mu.Lock()
			err := d.startErr
			p.mu.Unlock()
			if err != nil {
				return nil, err
			}
		}
	}
}

// start starts a machine for the disk, and tells those that wait.
func (d *Disk) start(over chan struct{}) {
	p := d.pool
	m, closer, err := p.boot(d.open)
	p.mu.Lock()
	defer p.mu.Unlock()
	defer close(over)
	d.starting, d.startErr = nil, nil
	if err != nil {
		d.startErr = fmt.Errorf("%w: %w", guestfs.ErrLost, err)
		d.failed(err)
		delete(p.disks, d)
		p.signal()
		return
	}
	d.machine, d.closer, d.used = m, closer, time.Now()
}

func (d *Disk) failed(err error) {
	d.failures++
	d.failedAt, d.why = time.Now(), err
	d.pool.config.Log.Warn("appliance failed", "error", err)
}

func (p *Pool) boot(open Opener) (_ *machine, _ io.Closer, err error) {
	image, initrd, err := p.prepare()
	if err != nil {
		return nil, nil, err
	}
	disk, closer, err := open(p.ctx)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, closer.Close())
		}
	}()
	accel := p.accel()
	m, err := p.config.start(p.ctx, disk, image, initrd, accel)
	if err != nil && accel == "kvm" && p.config.Accel == "" && p.ctx.Err() == nil {
		// /dev/kvm may be there and guests hang on it all the same.
		p.parts.Lock()
		p.parts.accel = "tcg"
		p.parts.Unlock()
		m, err = p.config.start(p.ctx, disk, image, initrd, "tcg")
	}
	return m, closer, err
}

func (p *Pool) accel() string {
	if p.config.Accel != "" {
		return p.config.Accel
	}
	p.parts.Lock()
	defer p.parts.Unlock()
	if p.parts.accel == "" {
		p.parts.accel = "tcg"
		if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err == nil {
			_ = f.Close()
			p.parts.accel = "kvm"
		}
	}
	return p.parts.accel
}

// prepare makes kernel and initramfs, once.
func (p *Pool) prepare() (image, initrd *os.File, err error) {
	p.parts.Lock()
	defer p.parts.Unlock()
	if p.parts.initrd != nil {
		return p.parts.image, p.parts.initrd, nil
	}
	k, err := findKernel(p.config.Kernel)
	if err != nil {
		return nil, nil, err
	}
	program := p.config.Program
	if program == "" {
		if program, err = os.Executable(); err != nil {
			return nil, nil, err
		}
	}
	initrd, err = memoryFile("initramfs", func(w io.Writer) error { return writeInitramfs(p.ctx, w, program, k) })
	if err != nil {
		return nil, nil, fmt.Errorf("initramfs: %w", err)
	}
	image, err = memoryFile("kernel", func(w io.Writer) error {
		f, err := os.Open(k.image)
		if err != nil {
			return err
		}
		_, err = io.Copy(w, f)
		return errors.Join(err, f.Close())
	})
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("kernel: %w", err), initrd.Close())
	}
	p.parts.image, p.parts.initrd = image, initrd
	return image, initrd, nil
}

// ask asks the disk's machine. If that fails, it is ended, and the next question starts another.
func (d *Disk) ask(ctx context.Context, r *request, limit time.Duration) ([]byte, error) {
	m, err := d.acquire(ctx)
	if err != nil {
		return nil, err
	}
	out, err := m.client.ask(ctx, r, limit)
	if !errors.Is(err, errClient) {
		d.release(false)
		return out, err
	}
	// Its last words come a little later than its end.
	select {
	case <-m.exited:
	case <-time.After(time.Second):
	}
	err = fmt.Errorf("%w: %s: %w: %s", guestfs.ErrLost, r.volume, err, m.console.reason())
	p := d.pool
	p.mu.Lock()
	first := d.machine == m
	if first {
		d.failed(err)
		p.detach(d)
	}
	p.mu.Unlock()
	d.release(true)
	if first {
		m.end()
	}
	return nil, err
}

func (d *Disk) release(failed bool) {
	p := d.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	d.users--
	d.used = time.Now()
	if !failed {
		d.failures = 0
	}
	if d.users == 0 {
		p.signal()
	}
}
