package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/nbd/kernel"
)

func newAttach(g *globals) *cobra.Command {
	var o attachOptions
	c := &cobra.Command{
		Use:   "attach NAME@POINT -r REPO | nbd://HOST/EXPORT | nbd+unix:///EXPORT?socket=PATH",
		Short: "Make a disk of a restore point, or any NBD export, a block device",
		Long: `Make a disk of a restore point, or an export of any NBD server, a block device of this
host: /dev/nbdN, by the kernel's NBD client. It needs root and the kernel's module nbd.

A restore point is served by this process itself. It is read-only, unless --writable is
given: then what is written goes into an overlay, as with export.

The command stays and looks after the device. When a connection breaks, such as when the
server is started again, it makes a new one: requests wait meanwhile, for as long as
--dead-conn-timeout says, and then fail. Interrupt it, or run "tidemark detach", to detach the
device; while it is mounted an interrupt waits for it to be unmounted, and a second one does not.

If the command itself is killed the device stays. Start it again with the same arguments and
--device to go on; with --writable that needs --overlay.

The kernel's client has no TLS. It reads and writes whole sectors: of an export whose size is no multiple
of 512 bytes the end is not seen. Don't swap to a device whose server runs on the same host.`,
		Example: `  tidemark attach web1@latest -r /srv/backup
  mount -o ro,noload /dev/nbd0 /mnt/disk
  tidemark attach web1@latest -r /srv/backup --device /dev/nbd3 --writable --overlay web1.overlay
  tidemark attach nbd://backup.example.com/disk0 --device /dev/nbd3 --connections 8
  tidemark detach /dev/nbd3`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) error { return o.run(c, g, a[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.device, "device", "", "the device, such as /dev/nbd3 (default: one that is free)")
	f.IntVar(&o.disk, "disk", -1, "which disk of the point, if it has several")
	f.BoolVar(&o.writable, "writable", false, "let the device be written to: a point into an overlay, an export if its server allows it")
	f.StringVar(&o.overlay, "overlay", "", "file that keeps what is written, made if it is not there")
	f.StringVar(&o.limit, "overlay-limit", "", "how much the overlay may hold, such as 20GiB: past it writes fail with \"no space left\"")
	f.IntVar(&o.connections, "connections", kernel.DefaultConnections, "how many connections to use, if the server allows several")
	f.DurationVar(&o.timeout, "timeout", kernel.DefaultTimeout, "how long a request may take before its connection counts as broken and it is sent again")
	f.DurationVar(&o.deadConn, "dead-conn-timeout", kernel.DefaultDeadConn, "how long requests wait for a server that is gone before they fail")
	return c
}

type attachOptions struct {
	exportOptions
	device            string
	connections       int
	timeout, deadConn time.Duration
}

// attached is what is printed when the device is there.
type attached struct {
	Device      string `json:"device"`
	What        string `json:"attached"`
	Size        int64  `json:"size"`
	BlockSize   int    `json:"block_size"`
	ReadOnly    bool   `json:"read_only"`
	Connections int    `json:"connections"`
	Resumed     bool   `json:"resumed,omitempty"`
}

func (o attachOptions) check(what string) error {
	switch {
	case o.connections < 1 || o.connections > kernel.MaxConnections:
		return usageError{fmt.Errorf("attach: --connections %d: from 1 to %d", o.connections, kernel.MaxConnections)}
	case o.timeout < time.Second || o.deadConn < time.Second:
		return usageError{errors.New("attach: --timeout and --dead-conn-timeout are one second at least")}
	case nbd.IsURI(what) && (o.overlay != "" || o.limit != "" || o.disk >= 0):
		return usageError{errors.New("attach: --disk, --overlay and --overlay-limit go with a restore point, not with a server of one's own")}
	}
	return nil
}

func (o attachOptions) run(c *cobra.Command, g *globals, what string) (err error) {
	if err := o.check(what); err != nil {
		return err
	}
	k := kernel.Options{
		Index: -1, Connections: o.connections, ReadOnly: !o.writable, Timeout: o.timeout, DeadConn: o.deadConn,
		Note: func(text string) {
			if !g.quiet {
				fmt.Fprintln(os.Stderr, "tidemark: "+text)
			}
		},
	}
	if o.device != "" {
		if k.Index, err = kernel.ParseDevice(o.device); err != nil {
			return usageError{err}
		}
	}
	if nbd.IsURI(what) {
		u, err := nbd.ParseURI(what)
		if err != nil {
			return usageError{err}
		}
		k.Dial, k.Export, k.Backend = kernel.DialURI(u), u.Export, what
		return o.attach(c, g, k, what)
	}
	// What can't be attached anyway is not opened first.
	if err := kernel.Available(); err != nil {
		return err
	}
	return o.servePoint(c, g, k, what)
}

// servePoint serves a disk of a point in this process while it is attached.
func (o attachOptions) servePoint(c *cobra.Command, g *globals, k kernel.Options, ref string) (err error) {
	if err := o.checkOverlay("attach"); err != nil {
		return err
	}
	cat, repo, p, err := g.bootable(c, ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	if len(p.Disks) > 1 && o.disk < 0 {
		return usageError{fmt.Errorf("attach: %s@%s has %d disks: say which with --disk", p.VM, p.ID, len(p.Disks))}
	}
	disks, err := chooseDisks(p, max(o.disk, 0))
	if err != nil {
		return err
	}
	e, opened, err := o.open(c.Context(), cat, p, disks[0], false)
	defer func() { err = errors.Join(err, opened.Close()) }()
	if err != nil {
		return err
	}
	what := p.VM + "@" + p.ID + " " + e.Name
	k.Export = e.Name
	if k.Backend = "tidemark " + what; o.writable {
		// Only with the same overlay would it be the same disk.
		if k.Backend += " " + absolute(o.overlay); o.overlay == "" {
			k.Backend = ""
		}
	}
	set, err := nbd.NewStatic(e)
	if err != nil {
		return err
	}
	// The server outlives the interrupt: what is detached is flushed first.
	ctx, cancel := context.WithCancel(context.WithoutCancel(c.Context()))
	l := kernel.NewLocal()
	k.Dial = l.Dial
	srv := &nbd.Server{Exports: set, Log: serverLog()}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l) }()
	defer func() {
		cancel()
		err = errors.Join(err, <-served)
	}()
	return o.attach(c, g, k, what)
}

// attach attaches the device and looks after it.
func (o attachOptions) attach(c *cobra.Command, g *globals, k kernel.Options, what string) error {
	d, err := kernel.Attach(c.Context(), k)
	if err != nil {
		return err
	}
	info := attached{d.Path(), what, d.Size(), d.BlockSize(), d.ReadOnly(), d.Connections(), d.Resumed()}
	mode := "read-only"
	if !info.ReadOnly {
		mode = "writable"
	}
	verb := "is"
	if info.Resumed {
		verb = "is again"
	}
	err = g.say(c, info, "%s %s %s, %s, %s, %d connections", info.Device, verb, info.What, mode, size(info.Size), info.Connections)
	if err != nil { // nobody knows of it
		return errors.Join(err, d.Detach())
	}
	if d.Keep(c.Context()) == nil {
		return d.Close() // somebody has detached it
	}
	return detachUnused(d)
}

// detachUnused detaches a device after an interrupt, when it is no longer mounted or after another interrupt.
func detachUnused(d *kernel.Device) error {
	again := make(chan os.Signal, 1)
	signal.Notify(again, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(again)
	for told := false; ; {
		used, err := d.InUse()
		if err != nil {
			fmt.Fprintln(os.Stderr, "tidemark: "+err.Error())
		}
		if !used {
			return d.Detach()
		}
		if !told {
			fmt.Fprintf(os.Stderr, "tidemark: %s is mounted or part of another device: waiting for it to be let go; interrupt again to detach it anyway\n", d.Path())
			told = true
		}
		select {
		case <-again:
			return d.Detach()
		case <-time.After(lookForUsers):
		}
	}
}

// lookForUsers is how often a device that should be detached is looked at.
const lookForUsers = 200 * time.Millisecond

func newDetach(g *globals) *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:   "detach /dev/nbdN...",
		Short: "Detach NBD block devices",
		Long: `Detach NBD block devices, whoever attached them. What was written is made durable on the server before.

One that is mounted, or part of another device, is left alone. --force detaches it all the same, and does not wait
for a server that is gone: what it has not got is lost.`,
		Example: "  tidemark detach /dev/nbd3",
		Args:    args(1, -1),
		RunE: func(c *cobra.Command, devs []string) error {
			var indexes []int
			for _, dev := range devs {
				n, err := kernel.ParseDevice(dev)
				if err != nil {
					return usageError{err}
				}
				indexes = append(indexes, n)
			}
			var errs []error
			for _, n := range indexes {
				err := detachOne(n, force)
				if err == nil {
					err = g.say(c, map[string]string{"detached": kernel.Path(n)}, "%s is detached", kernel.Path(n))
				}
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "also if it is mounted or the server is gone")
	c.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return kernel.Attached(), cobra.ShellCompDirectiveNoFileComp
	}
	return c
}

func detachOne(index int, force bool) error {
	if !force {
		used, err := kernel.InUse(index)
		if err != nil {
			return err
		}
		if used {
			return fmt.Errorf("%s is mounted or part of another device: unmount it first, or give --force", kernel.Path(index))
		}
	}
	return kernel.Detach(index, force)
}
