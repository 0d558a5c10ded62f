package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/vm"
)

func newBoot(g *globals) *cobra.Command {
	var o bootOptions
	c := &cobra.Command{
		Use:   "boot NAME@POINT -r REPO",
		Short: "Run a restore point as a VM, at once, or check that it boots",
		Long: `Run a restore point as a throw-away VM under QEMU on this host, while its disks are read from
the repository as they are needed. POINT is latest, proven (the newest that a check has seen to boot), the
start of an ID, or a time. The guest's serial console is this terminal's. Ctrl-C cuts its power.

What the VM writes goes into an overlay, the point stays as it is. Without --overlay it is gone at the end. With
it, the same command goes on with all that the guest had flushed, however the last run ended; "tidemark commit" makes
a restore point of it, "--hydrate" a disk of its own.

The machine is that of the point's configuration if it has one, else a plain one; flags override. It has no network
unless --network user gives it one of its own, and none of its network cards is plugged into anything.

If the repository can't be read for a while, the VM is paused, and goes on where it was. If this
process is killed, QEMU is killed too: for the guest it is a power failure.

--verify watches the console and the screen until the guest shows a login prompt (or --expect), or that it has
failed, and keeps the verdict, the console's text and a picture of the screen beside the point: see
"tidemark points". It ends with 9 if the VM did not come up.`,
		Example: `  tidemark boot web1@latest -r /srv/backup
  tidemark boot web1@latest -r /srv/backup --overlay web1.overlay --memory 4GiB --cpus 2 --bus sata
  tidemark boot web1@latest -r /srv/backup --verify --timeout 3m --screenshot web1.png
  tidemark boot web1@proven -r /srv/backup --overlay web1.overlay --hydrate /dev/vg0/web1 --network user
  tidemark boot fc1 -r /srv/backup --kernel vmlinux --append "console=ttyS0 root=/dev/vda"`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) error { return o.run(c, g, a[0]) },
	}
	o.flags(c.Flags())
	c.ValidArgsFunction = g.completePoint
	return c
}

type bootOptions struct {
	machineOptions
	overlay, limit string

	verify     bool
	expect     string
	timeout    time.Duration
	screenshot string
	console    string
	forget     bool // the verdict

	hydrate hydrateOptions
}

func (o *bootOptions) flags(f *pflag.FlagSet) {
	f.StringVar(&o.overlay, "overlay", "", "file that keeps what the VM writes, made if it is not there; with more than one disk, .diskN is added")
	f.StringVar(&o.limit, "overlay-limit", "", "how much an overlay may hold, such as 20GiB: past it the VM is paused")
	o.machineOptions.flags(f)
	f.BoolVar(&o.verify, "verify", false, "check that it boots, and end")
	f.StringVar(&o.expect, "expect", "", "with --verify: regular expression that shows on the console that it is up, instead of a login prompt")
	f.DurationVar(&o.timeout, "timeout", vm.DefaultCheckTimeout, "with --verify: how long to wait")
	f.StringVar(&o.screenshot, "screenshot", "", "with --verify: file for a picture of the screen (PNG)")
	f.StringVar(&o.console, "console", "", "file that the serial console's text is added to")
	f.BoolVar(&o.forget, "no-record", false, "with --verify: don't keep the verdict in the repository")
	o.hydrate.flags(f)
}

func (o *bootOptions) check() (*regexp.Regexp, error) {
	switch {
	case !o.verify && (o.expect != "" || o.screenshot != "" || o.forget):
		return nil, usageError{errors.New("boot: --expect, --screenshot and --no-record go with --verify")}
	case o.verify && len(o.hydrate.targets) > 0:
		return nil, usageError{errors.New("boot: --verify and --hydrate exclude each other: a check ends, hydration goes on")}
	case o.verify && o.overlay != "":
		return nil, usageError{errors.New("boot: --verify and --overlay exclude each other: a check is of the point as it is")}
	case len(o.hydrate.targets) > 0 && o.overlay == "":
		return nil, usageError{errors.New("boot: --hydrate needs --overlay FILE: until the disk is whole, what the VM writes must outlive everything")}
	}
	if o.expect == "" {
		return nil, nil
	}
	re, err := regexp.Compile("(?m)" + o.expect)
	if err != nil {
		return nil, usageError{fmt.Errorf("boot: --expect: %w", err)}
	}
	return re, nil
}

func (o *bootOptions) run(c *cobra.Command, g *globals, ref string) (err error) {
	expect, err := o.check()
	if err != nil {
		return err
	}
	ctx := c.Context()
	cat, repo, p, err := g.bootable(c, ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	cfg, err := o.config(p)
	if err != nil {
		return err
	}
	accel, err := o.chooseAccel(ctx)
	if err != nil {
		return err
	}
	b, err := o.serve(ctx, cat, p)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	m := vm.MachineOptions{
		Config: *cfg, Disks: b.backings, Dir: b.dir, Accel: accel, Network: o.network == "user", Display: o.display, VNC: o.vnc,
	}
	if o.verify {
		return o.runCheck(c, g, repo, p, b, m, expect)
	}
	return o.runConsole(c, g, p, b, m)
}

// booting are a point's disks, served to one machine.
type booting struct {
	dir      string // the machine's, with the socket in it
	goesOn   bool   // the machine outlives this process, and its folder with it
	disks    []bootDisk
	backings map[string]vm.Backing
	stop     context.CancelFunc
	served   chan error
}

// bootDisk is a disk as its machine sees it, and what lies below.
type bootDisk struct {
	name    string
	live    *restore.Hydratable
	file    string // of the overlay, unless it is a temporary one
	closers closers
}

// serve opens the disks with their overlays and serves them on a socket that only this user
// can reach.
func (o *bootOptions) serve(ctx context.Context, cat *restore.Catalog, p *restore.PointDetails) (_ *booting, err error) {
	ov := exportOptions{overlay: o.overlay, limit: o.limit, writable: true}
	if o.limit != "" {
		n, err := humanize.ParseBytes(o.limit)
		if err != nil || n > 1<<62 {
			return nil, usageError{fmt.Errorf("boot: --overlay-limit %s: a size such as 20GiB", o.limit)}
		}
		ov.limitBytes = int64(n)
	}
	dir, err := os.MkdirTemp("", "tidemark-boot-")
	if err != nil {
		return nil, err
	}
	b := &booting{dir: dir, backings: map[string]vm.Backing{}, served: make(chan error, 1), stop: func() {}}
	b.served <- nil // nothing is served yet
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	socket := filepath.Join(dir, "nbd")
	var exports []nbd.Export
	for i, info := range p.Disks {
		d, closer, err := cat.Open(ctx, p, i)
		if err != nil {
			return nil, err
		}
		b.disks = append(b.disks, bootDisk{name: info.Name, closers: closers{closer}})
		bd := &b.disks[i]
		over, err := ov.openOverlay(cat, p, i, len(p.Disks) > 1, d)
		if err != nil {
			return nil, err
		}
		bd.closers = append(bd.closers, over)
		bd.live = restore.NewHydratable(over)
		if o.overlay != "" {
			bd.file = ov.overlayFile(p, i, len(p.Disks) > 1)
		}
		exports = append(exports, nbd.Export{Name: info.Name, Description: p.VM + "@" + p.ID + " " + info.Name, Disk: bd.live})
		b.backings[info.Name] = vm.Backing{NBD: socket, Export: info.Name}
	}
	set, err := nbd.NewStatic(exports...)
	if err != nil {
		return nil, err
	}
	l, err := nbd.Listen(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	// It ends after QEMU, which flushes at its end, and not with ctx.
	serve, stop := context.WithCancel(context.WithoutCancel(ctx))
	b.stop = stop
	b.served = make(chan error, 1)
	// What fails is told by who watches the machine.
	srv := &nbd.Server{Exports: set, Log: slog.New(slog.DiscardHandler)}
	go func() { b.served <- srv.Serve(serve, l) }()
	return b, nil
}

// close ends serving, makes the overlays durable and closes all.
func (b *booting) close() error {
	b.stop()
	err := <-b.served
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	for _, d := range b.disks {
		err = errors.Join(err, d.closers.Close())
	}
	if b.goesOn {
		return err
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}

// broken says why disks failed, if they did, and forgets it.
func (b *booting) broken() error {
	var errs []error
	for _, d := range b.disks {
		if err := d.live.Failure(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", d.name, err))
		}
	}
	return errors.Join(errs...)
}

// runConsole runs the machine with its console on the terminal.
func (o *bootOptions) runConsole(c *cobra.Command, g *globals, p *restore.PointDetails, b *booting, mo vm.MachineOptions) (err error) {
	ctx := c.Context()
	out := c.OutOrStdout()
	log := newBootLog(c, g)
	mo.Console = out
	if g.json {
		mo.Console = io.Discard
	}
	if o.console != "" {
		f, err := os.OpenFile(o.console, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		mo.Console = io.MultiWriter(mo.Console, f)
	}
	in, restoreTerminal, err := typed(c.InOrStdin())
	if err != nil {
		return err
	}
	defer restoreTerminal()
	mo.Input = in
	h := &hydration{b: b, log: log}
	if h.targets, h.limit, err = o.hydrate.parse(b.disks); err != nil {
		return err
	}
	if h.m, err = vm.StartMachine(ctx, mo); err != nil {
		return errors.Join(err, b.broken())
	}
	log.say("%s@%s runs (%s), Ctrl-C cuts its power", p.VM, p.ID, mo.Accel)
	var work sync.WaitGroup
	watch, stop := context.WithCancel(ctx)
	work.Go(func() { h.m.Watch(watch, log.watcher(b)) })
	h.begin(ctx, &work)
	select {
	case <-h.m.Done():
	case <-ctx.Done():
	}
	h.cancel()
	stop()
	work.Wait() // before the end is decided: it may be pivoting
	if h.isOver() && ctx.Err() != nil {
		b.goesOn = true
		log.say("the VM goes on; QEMU's monitor (QMP) is %s", filepath.Join(b.dir, "qmp"))
	} else {
		err = errors.Join(h.m.Quit(context.WithoutCancel(ctx)), h.m.Err())
	}
	return errors.Join(err, h.err(), g.bootDone(c, p, h))
}

// bootLog tells what happens to a machine on standard error: the console has standard output.
type bootLog struct {
	w  io.Writer
	mu sync.Mutex
}

func newBootLog(c *cobra.Command, g *globals) *bootLog {
	if g.quiet {
		return &bootLog{w: io.Discard}
	}
	return &bootLog{w: c.ErrOrStderr()}
}

func (l *bootLog) say(format string, a ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _ = fmt.Fprintf(l.w, "tidemark: "+format+"\r\n", a...)
}

func (l *bootLog) watcher(b *booting) vm.Watcher {
	return vm.Watcher{
		Stalled: func(s vm.Stall) {
			why := "reading"
			if s.Write {
				why = "writing"
			}
			reason := s.Reason
			if err := b.broken(); err != nil {
				reason = err.Error()
			}
			l.say("the VM is paused: %s %s failed: %s; it is tried again until it works", why, s.Disk, reason)
		},
		Resumed:  func() { l.say("the VM goes on") },
		Panicked: func() { l.say("the guest's kernel panicked") },
	}
}

// bootDone prints the JSON of a run.
func (g *globals) bootDone(c *cobra.Command, p *restore.PointDetails, h *hydration) error {
	if !g.json {
		return nil
	}
	return printJSON(c.OutOrStdout(), map[string]any{"vm": p.VM, "point": p.ID, "hydrated": h.results()})
}

// typed is what the user types, for the guest. On a terminal each key goes at once, and is not shown here. It may
// be read no more when the machine has ended.
func typed(in io.Reader) (io.Reader, func(), error) {
	f, ok := in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil, func() {}, nil // nobody types; what is piped in is not for a guest that may not listen yet
	}
	undo, err := eachKey(int(f.Fd()))
	if err != nil {
		return nil, nil, err
	}
	return f, undo, nil
}

// machineJSON is what a check was run on.
func machineJSON(cfg *vm.Config, accel string) json.RawMessage {
	short := *cfg
	short.Source = nil
	b, err := json.Marshal(map[string]any{"config": short, "accel": accel})
	if err != nil {
		return nil
	}
	return b
}
