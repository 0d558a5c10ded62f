package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// outcome is the instant that the disks were brought to.
type outcome struct {
	instant     time.Time
	consistency store.Consistency
	quiesce     store.Quiesce
	chosen      string
}

// maxHeld bounds the memory that the last round may take, in bytes.
const maxHeld = 256 << 20

// leastHeld is what a pause may always hold, in bytes.
const leastHeld = 32 << 20

// minWatch is how long a pause may at least last before the watchdog ends it.
const minWatch = 3 * time.Second

// convergence is one run of converge.
type convergence struct {
	job    Job
	disks  []*disk
	pauser Pauser
	dog    *watchdog
	outcome
	pauses  int
	swapped time.Time     // when the last round's epochs were all open
	unknown []string      // why the last round's extents could not be proven
	worst   time.Duration // what the last failed pause would have needed
	meter   meter
	notes   *checkpoints
	mayHold int64 // bytes that the pause may read into memory
}

// converge reads what changed, round after round, until the disks show one
// instant: because nothing was written from a swap until all was read, or because the
// guest stood still for the last round.
func (j Job) converge(ctx context.Context, disks []*disk, users []user, notes *checkpoints) (_ outcome, err error) {
	c := &convergence{job: j, disks: disks, meter: meter{report: j.Progress}, notes: notes}
	if c.pauser, c.chosen, err = j.Quiesce.pauser(devices(disks), users); err != nil {
		return outcome{}, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if c.pauser != nil {
		if err := c.pauser.Prepare(ctx); err != nil {
			return outcome{}, err
		}
		if c.dog, err = startWatchdog(j.Watchdog, c.pauser.rescue()); err != nil {
			return outcome{}, err
		}
	}
	err = c.rounds(ctx)
	return c.outcome, err
}

func (c *convergence) close() error {
	var err error
	if c.pauser != nil {
		err = c.pauser.Close()
	}
	if c.dog != nil {
		err = errors.Join(err, c.dog.close())
	}
	return err
}

func (c *convergence) pending() int64 {
	var n int64
	for _, d := range c.disks {
		n += d.pending.Bytes()
	}
	return n
}

// needs estimates how long the pending extents take to read.
func (c *convergence) needs() time.Duration {
	var s float64
	for _, d := range c.disks {
		s += float64(d.pending.Bytes()) / d.rate()
	}
	return time.Duration(s * 1e9)
}

// unseen says that writes to one of the disks are neither seen nor ruled out: no instant can be
// proven then, not even while a guest is paused.
func (c *convergence) unseen() error {
	for _, d := range c.disks {
		if _, err := d.src.Writes(); errors.Is(err, cbt.ErrUncounted) {
			return fmt.Errorf("%s: %w: %w (%s); shut the VM down, or attach the file with `losetup -f --show FILE` and let the VM use the loop device", d.path, ErrUnseen, err, c.chosen)
		}
	}
	return nil
}

func (c *convergence) rounds(ctx context.Context) error {
	if err := c.unseen(); err != nil {
		return c.giveUp(ctx, err)
	}
	stalled := 0
	c.swapped = time.Now()
	for before := int64(-1); ; {
		c.quiesce.Rounds++
		if err := c.readRunning(ctx); err != nil {
			return err
		}
		if c.pauser != nil {
			if err := c.pauser.Flush(ctx); err != nil {
				return err
			}
		}
		opened := c.swapped // also where it was a pause in vain that swapped last
		if err := c.syncAll(); err != nil {
			return err
		}
		if quiet, err := c.quiet(); err != nil {
			return err
		} else if quiet {
			c.instant, c.consistency, c.quiesce.Method = opened, store.Crash, "quiet"
			return nil
		}
		// All are swapped before anything is read, so that the epochs of all disks have a
		// moment in common.
		if err := c.swapAll(ctx); err != nil {
			return err
		}
		// A file that nobody had open for writing may have been opened meanwhile.
		if err := c.unseen(); err != nil {
			return c.giveUp(ctx, err)
		}
		left := c.pending()
		if left == 0 {
			// Nothing was submitted or completed between the swaps: what was
			// read after the first of them is the disk at any moment in between.
			c.instant, c.consistency, c.quiesce.Method = opened, store.Crash, "quiet"
			return nil
		}
		if before >= 0 && left > before*7/10 {
			stalled++
		}
		before = left
		last := c.quiesce.Rounds >= maxRounds || stalled >= 2
		if c.pauser == nil {
			if last {
				return c.giveUp(ctx, fmt.Errorf("%w (%s)", ErrInUse, c.chosen))
			}
			continue
		}
		if !last && c.needs() > c.job.PauseBudget/8 {
			continue
		}
		ok, err := c.pause(ctx)
		if err != nil || ok {
			return err
		}
		if c.pauses >= maxPauses {
			return c.giveUp(ctx, fmt.Errorf("%w: after %d attempts the last round needs about %v, the budget is %v",
				ErrPauseBudget, c.pauses, c.worst.Round(time.Millisecond), c.job.PauseBudget))
		}
	}
}

// giveUp ends without an instant: with an error, or, if that was asked for, with
// a point that says so.
func (c *convergence) giveUp(ctx context.Context, why error) error {
	if len(c.unknown) > 0 {
		why = fmt.Errorf("%w; what changed could not be proven either: %s", why, strings.Join(c.unknown, "; "))
	}
	if !c.job.AllowInconsistent {
		return why
	}
	c.quiesce.Rounds++
	c.instant, c.consistency, c.quiesce.Method = time.Now(), store.None, "none"
	c.chosen = "none: " + why.Error()
	return c.readRunning(ctx)
}

// quiet tells whether nothing was written since the last swap. All has been read by then: so what was
// read is the disks at any moment between the swap's end and now.
func (c *convergence) quiet() (bool, error) {
	seen := make([]cbt.Evidence, len(c.disks))
	for i, d := range c.disks {
		quiet, e, err := d.src.Quiet()
		if err != nil || !quiet {
			return false, err
		}
		if err := d.same(e); err != nil {
			return false, fmt.Errorf("%s: %w: %w", d.path, cbt.ErrDeviceChanged, err)
		}
		seen[i] = e
	}
	for i, d := range c.disks {
		d.evidence = append(d.evidence, seen[i])
	}
	return true, nil
}

func (c *convergence) syncAll() error {
	for _, d := range c.disks {
		if err := d.sync(); err != nil {
			return err
		}
	}
	return nil
}

// swapAll swaps the epochs of all disks at once: each waits for a grace period.
func (c *convergence) swapAll(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, d := range c.disks {
		g.Go(func() error { return d.advance(ctx) })
	}
	err := g.Wait()
	c.swapped, c.unknown = time.Now(), nil
	for _, d := range c.disks {
		c.unknown = append(c.unknown, d.unknown...)
	}
	return err
}

func (c *convergence) readRunning(ctx context.Context) error {
	c.meter.start(Progress{Round: c.quiesce.Rounds, Total: c.pending(), Phase: "reading"})
	for _, d := range c.disks {
		holes, err := d.holes(d.pending, d.grain)
		if err != nil {
			return err
		}
		for _, h := range holes {
			if err := d.out.Zero(ctx, h.Off, h.Len); err != nil {
				return err
			}
			c.meter.add(h.Len)
			d.written.add(h.Off, h.Len)
		}
		data := without(d.pending, holes)
		err = d.device.read(ctx, data, func(ctx context.Context, off int64, p []byte) error {
			if err := d.out.Write(ctx, off, p); err != nil {
				return err
			}
			n := int64(len(p))
			c.meter.add(n)
			d.written.add(off, n)
			return c.notes.stored(ctx, n, c.disks)
		})
		if err != nil {
			return err
		}
		d.read += data.Bytes()
		d.pending = nil
		d.written.clear()
	}
	return nil
}

// held is a piece of a disk that was read while the guest stood still.
type held struct {
	disk *disk
	off  int64
	data []byte
}

// pause tries the last round. False means that it took too long, or that
// somebody wrote all the same: then the guest runs again and the extents are pending.
func (c *convergence) pause(ctx context.Context) (ok bool, err error) {
	c.pauses++
	c.quiesce.Rounds++
	total := c.quiesce.Paused
	c.meter.start(Progress{Round: c.quiesce.Rounds, Total: c.pending(), Phase: "paused"})
	// As much again may change until the guest stands still.
	c.mayHold = min(maxHeld, 2*c.pending()+leastHeld)
	letGo, err := c.disks[0].lane.hold(ctx, c.mayHold)
	if err != nil {
		return false, err
	}
	defer letGo()
	running, err := c.pauser.Running(ctx)
	if err != nil {
		return false, err
	}
	for _, d := range c.disks {
		if err := d.src.Prepare(); err != nil {
			return false, err
		}
	}
	limit := max(minWatch, 4*c.job.PauseBudget)
	if running {
		// A guest that stands still by somebody else's will is not ours to resume.
		if err := c.dog.arm(limit); err != nil {
			return false, err
		}
	}
	begin := time.Now()
	resume := sync.OnceValue(func() error { return c.resume(running, begin) })
	// If reading hangs, the guest is resumed from here; the watchdog is for when
	// this process can't do it.
	late := time.AfterFunc(limit/2, func() { _ = resume() })
	pieces, ok, err := c.standStill(ctx, begin)
	ok = late.Stop() && ok
	if err = errors.Join(err, resume()); err != nil {
		return false, err
	}
	paused := c.quiesce.Paused - total
	if !ok {
		c.worst = paused + c.needs()
		return false, nil
	}
	c.consistency, c.quiesce.Method = c.pauser.Consistency(), c.pauser.Method()
	return true, c.keep(ctx, pieces)
}

// resume lets the guest run and tells the watchdog. It doesn't obey the job's context: a backup
// that is cancelled has to resume its guest too.
func (c *convergence) resume(armed bool, begin time.Time) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := c.pauser.Resume(ctx)
	c.quiesce.Paused += time.Since(begin)
	if err != nil || !armed {
		return err // if it is armed, the watchdog does it
	}
	return c.dog.disarm()
}

// standStill pauses, and reads what is pending then into memory.
func (c *convergence) standStill(ctx context.Context, begin time.Time) ([]held, bool, error) {
	if err := c.pauser.Pause(ctx); err != nil {
		return nil, false, err
	}
	if err := c.settle(ctx); err != nil {
		return nil, false, err
	}
	if err := c.syncAll(); err != nil {
		return nil, false, err
	}
	// Before the swaps: what is written after this either shows in the counters or not at
	// all. What a swap closes over is read, but may belong to another instant.
	before, err := c.writes()
	if err != nil {
		return nil, false, err
	}
	c.instant = time.Now()
	if err := c.swapAll(ctx); err != nil {
		return nil, false, err
	}
	deadline := begin.Add(c.job.PauseBudget)
	if c.pending() > c.mayHold || time.Now().Add(c.needs()).After(deadline) {
		return nil, false, nil
	}
	pieces, ok, err := c.hold(ctx, deadline)
	if err != nil || !ok {
		return nil, false, err
	}
	after, err := c.writes()
	if err != nil {
		return nil, false, err
	}
	// A writer that was not paused, or a write that was still in flight.
	return pieces, slices.Equal(before, after), nil
}

// settle waits until no write has been seen for a moment.
func (c *convergence) settle(ctx context.Context) error {
	before, err := c.writes()
	for range 20 {
		if err != nil {
			return err
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			return err
		}
		var now []uint64
		if now, err = c.writes(); slices.Equal(before, now) {
			return err
		}
		before = now
	}
	return nil // the check at the end of the pause decides
}

func (c *convergence) writes() ([]uint64, error) {
	out := make([]uint64, len(c.disks))
	for i, d := range c.disks {
		n, err := d.src.Writes()
		if errors.Is(err, cbt.ErrUncounted) {
			return nil, fmt.Errorf("%s: no instant can be proven: %w", d.path, err)
		}
		if err != nil {
			return nil, err
		}
		out[i] = n
	}
	return out, nil
}

// hold reads the pending extents into memory; false if the deadline passes.
func (c *convergence) hold(ctx context.Context, deadline time.Time) ([]held, bool, error) {
	var pieces []held
	var mu sync.Mutex
	errLate := errors.New("late")
	for _, d := range c.disks {
		err := d.readNow(ctx, d.pending, func(_ context.Context, off int64, p []byte) error {
			if time.Now().After(deadline) {
				return errLate
			}
			mu.Lock()
			defer mu.Unlock()
			pieces = append(pieces, held{d, off, slices.Clone(p)})
			return nil
		})
		if errors.Is(err, errLate) {
			return nil, false, nil
		}
		if err != nil {
			return nil, false, err
		}
	}
	return pieces, true, nil
}

// keep stores what was held. The guest runs already.
func (c *convergence) keep(ctx context.Context, pieces []held) error {
	for _, p := range pieces {
		if err := p.disk.out.Write(ctx, p.off, p.data); err != nil {
			return err
		}
		c.meter.add(int64(len(p.data)))
		p.disk.read += int64(len(p.data))
	}
	for _, d := range c.disks {
		d.pending = nil
	}
	return nil
}
