package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/pflag"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/vm"
)

// hydrateOptions say where the disks of a booted point go.
type hydrateOptions struct {
	targets []string
	limit   string
}

func (o *hydrateOptions) flags(f *pflag.FlagSet) {
	f.StringArrayVar(&o.targets, "hydrate", nil, "copy the disk to this file or block device while the VM runs, then move the VM to it; with more than one disk: disk0=FILE, once for each")
	f.StringVar(&o.limit, "hydrate-limit", "", "copy at most so much per second, such as 50MiB")
}

// hydrateRetry is how long is waited after a failure: the repository may be back, or room on the target.
const hydrateRetry = 10 * time.Second

// pivotLimit bounds how long the guest stands still for the last changes and the move.
const pivotLimit = time.Minute

// hydration brings the disks of a running machine to targets.
type hydration struct {
	m       *vm.Machine
	b       *booting
	log     *bootLog
	targets map[string]string // by disk
	limit   int64
	cancel  context.CancelFunc

	mu     sync.Mutex
	failed error
	over   bool // the machine reads from the targets
	done   map[string]restore.HydrateResult
}

// parse checks the flags.
func (o *hydrateOptions) parse(disks []bootDisk) (targets map[string]string, limit int64, err error) {
	if o.limit != "" {
		n, err := humanize.ParseBytes(o.limit)
		if err != nil || n == 0 || n > 1<<50 || len(o.targets) == 0 {
			return nil, 0, usageError{fmt.Errorf("boot: --hydrate-limit %s: a size per second such as 50MiB, together with --hydrate", o.limit)}
		}
		limit = int64(n)
	}
	targets = map[string]string{}
	for _, t := range o.targets {
		name, path, named := strings.Cut(t, "=")
		if !named {
			name, path = disks[0].name, t
			if len(disks) > 1 {
				return nil, 0, usageError{fmt.Errorf("boot: --hydrate %s: the point has %d disks: say which, as in %s=%s", t, len(disks), disks[0].name, t)}
			}
		}
		if path, err = filepath.Abs(path); err != nil {
			return nil, 0, err
		}
		targets[name] = path
	}
	if len(targets) == 0 {
		return targets, limit, nil
	}
	for _, d := range disks {
		if targets[d.name] == "" {
			return nil, 0, usageError{fmt.Errorf("boot: --hydrate: all disks of the VM or none: %s is missing", d.name)}
		}
	}
	if len(targets) != len(disks) || len(targets) != len(o.targets) {
		return nil, 0, usageError{errors.New("boot: --hydrate names a disk twice, or one that the point does not have")}
	}
	for _, path := range targets {
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
			return nil, 0, fmt.Errorf("boot: --hydrate %s: %w; a hydration that was interrupted goes on by itself, its file is %s until then", path, os.ErrExist, restore.Partial(path))
		}
	}
	return targets, limit, nil
}

// begin starts hydrating, if that is asked for, in a goroutine of work.
func (h *hydration) begin(ctx context.Context, work *sync.WaitGroup) {
	ctx, h.cancel = context.WithCancel(ctx)
	h.done = map[string]restore.HydrateResult{}
	if len(h.targets) == 0 {
		return
	}
	work.Go(func() {
		for {
			err := h.run(ctx)
			if err == nil || ctx.Err() != nil {
				return
			}
			if hopeless(err) || h.isOver() {
				h.log.say("hydration failed, the VM goes on without it: %v", err)
				h.mu.Lock()
				h.failed = err
				h.mu.Unlock()
				return
			}
			h.log.say("hydration failed and is tried again in %v: %v", hydrateRetry, err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(hydrateRetry):
			}
		}
	})
}

// hopeless tells whether trying again does not help.
func hopeless(err error) bool {
	for _, e := range []error{os.ErrExist, restore.ErrTooSmall, restore.ErrTarget, restore.ErrBusy, os.ErrPermission} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// run copies all disks and moves the machine to them.
func (h *hydration) run(ctx context.Context) (err error) {
	var all []*restore.Hydration
	defer func() {
		for _, one := range all {
			err = errors.Join(err, one.Close())
		}
	}()
	for _, d := range h.b.disks {
		told, begin := 0, time.Now()
		h.log.say("hydrating %s to %s", d.name, h.targets[d.name])
		one, err := d.live.Hydrate(ctx, h.targets[d.name], restore.HydrateOptions{Limit: h.limit, Progress: func(done, total int64) {
			if percent := int(100 * done / total); percent/10 > told/10 && percent < 100 {
				told = percent
				h.log.say("hydrating %s: %d %%, %s of %s in %s", d.name, percent, size(done), size(total), short(time.Since(begin)))
			}
		}})
		if err != nil {
			return err
		}
		all = append(all, one)
	}
	return h.pivot(ctx, all)
}

// pivot moves the machine while its guest stands still. From the moment that the overlays are marked, the targets
// are the machine's disks, whatever ends this process: they hold all that the guest has written.
func (h *hydration) pivot(ctx context.Context, all []*restore.Hydration) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	begin := time.Now()
	// What interrupts this process must not interrupt it halfway.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pivotLimit)
	defer cancel()
	resume := func() error { return h.m.Resume(context.WithoutCancel(ctx)) }
	if err := h.m.Pause(ctx); err != nil {
		return errors.Join(err, resume())
	}
	results := map[string]restore.HydrateResult{}
	for i, one := range all {
		if results[h.b.disks[i].name], err = one.Finish(ctx); err != nil {
			return errors.Join(err, resume())
		}
	}
	moved := 0
	defer func() {
		if err == nil {
			return
		}
		c, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		there, failed := h.m.ReadsFrom(c, "disk0")
		if moved == 0 && failed == nil && there {
			for _, d := range h.b.disks {
				failed = errors.Join(failed, restore.UnmarkMoved(d.file))
			}
			if failed == nil {
				err = errors.Join(err, resume())
				return
			}
		}
		// A disk is moved, or may be, or a mark says so: the guest stands still.
		h.mu.Lock()
		h.over = true
		h.mu.Unlock()
		err = fmt.Errorf("%w\nthe VM is paused: end it, and run it from %v, which hold all that it wrote", errors.Join(err, failed), h.targets)
	}()
	for _, d := range h.b.disks {
		if err := restore.MarkMoved(d.file, h.targets[d.name]); err != nil {
			return err
		}
	}
	for i, one := range all {
		if err := h.m.Pivot(ctx, fmt.Sprintf("disk%d", i), one.Path(), one.IsDevice()); err != nil {
			return err
		}
		moved++
		h.mu.Lock()
		h.over = true
		h.mu.Unlock()
	}
	if err := errors.Join(h.m.Release(), resume()); err != nil {
		return err
	}
	paused := time.Since(begin)
	h.mu.Lock()
	h.done = results
	h.mu.Unlock()
	for _, d := range h.b.disks {
		r := results[d.name]
		h.log.say("%s runs from %s now: %s copied, the last %s while the VM was paused for %s", d.name, h.targets[d.name], size(r.Written), size(r.Last), short(paused))
	}
	h.log.say("the VM needs neither the repository nor this process any more: Ctrl-C leaves it running (its guard is process %d)", h.m.PID())
	return nil
}

// isOver tells whether the machine reads from the targets.
func (h *hydration) isOver() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.over
}

// err is why hydration failed, if it did.
func (h *hydration) err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.failed
}

// hydratedDisk is a hydration as --json says it.
type hydratedDisk struct {
	Disk   string `json:"disk"`
	Target string `json:"target"`
	restore.HydrateResult
}

func (h *hydration) results() []hydratedDisk {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := []hydratedDisk{}
	for _, d := range h.b.disks {
		if r, ok := h.done[d.name]; ok {
			out = append(out, hydratedDisk{d.name, h.targets[d.name], r})
		}
	}
	return out
}
