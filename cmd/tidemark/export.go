package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
)

func newExport(g *globals) *cobra.Command {
	var o exportOptions
	c := &cobra.Command{
		Use:   "export {NAME@POINT | --all | --vm NAME} -r REPO --socket PATH | --listen ADDR\n  tidemark export --live DEVICE [--since ID] --socket PATH | --listen ADDR",
		Short: "Serve the disks of restore points, or a device with what changed, over NBD",
		Long: `Serve the disks of a restore point over NBD, as exports called disk0, disk1, ...; a
client that names none gets the only one. POINT is latest, the start of an ID, or a
time; only an ID leads to a point that "tidemark repair" found to be damaged.

With --writable a client may write: what it writes goes into an overlay, and the
point stays as it is. The overlay is a file that --overlay names and that can be used
again, or a temporary one that is gone when the export ends. It takes space for what is
written and gives back what is discarded; --overlay-limit bounds it, per disk.

With --all, or --vm for some machines, one address serves all restore points, read-only,
as exports called NAME@POINT/disk0, also those made later. A disk is opened when a client
asks for it. Lists show the newest of them; older ones can be asked for all the same.

What changed since another point of the machine is the metadata context
qemu:dirty-bitmap:POINT: backup tools that read QEMU's dirty bitmaps can fetch
increments (docs/nbd.md).

With --live a block device of this host is served, read-only, for backup tools of others: they need no
repository. Its writes are tracked from the first time on. Each run prints a change ID; given back
with --since the next time, what changed since is the metadata context qemu:dirty-bitmap:ID. If that
can't be proven, all counts as changed, and the reason is printed.

The device is read while it is written: what a client reads shows no single instant, unless nothing
was written meanwhile, which is said at the end. What is written after this command has begun is in the
next increment. So make the last pull while the guest stands still. Nothing is forgotten when a client or
this command fails: pull again with the same --since. --commit-on-disconnect, or --commit ID later, forget what changed
up to there, also for "tidemark backup" of the same device, which compares the whole disk then.

` + serverHelp,
		Example: `  tidemark export web1@latest -r /srv/backup --socket /run/web1.sock --writable --overlay web1.overlay
  qemu-system-x86_64 -m 2G -blockdev driver=nbd,node-name=d0,server.type=unix,server.path=/run/web1.sock \
    -device virtio-blk-pci,drive=d0
  tidemark export web1@3f2a -r /srv/backup --listen 127.0.0.1:10809
  nbdcopy nbd://127.0.0.1 web1.raw
  tidemark export --all -r /srv/backup --listen :10809 --tls-certs /etc/tidemark/tls --allow 'CN=standby1:web1@*'
  nbdcopy 'nbds://backup.example.org/web1@latest/disk0?tls-certificates=/etc/pki/standby1' web1.raw
  tidemark export web1@latest -r /srv/backup --socket /run/web1.sock --socket-mode 0660 --socket-group kvm
  tidemark export --all -r /srv/backup --socket /run/points.sock
  nbdinfo --list 'nbd+unix:///?socket=/run/points.sock'
  nbdinfo --map=qemu:dirty-bitmap:3f2a 'nbd+unix:///web1@latest/disk0?socket=/run/points.sock'
  tidemark export --live /dev/vg0/web1 --socket /run/live.sock --json`,
		Args: args(0, 1),
		RunE: func(c *cobra.Command, a []string) error {
			switch several := o.all || len(o.vms) > 0; {
			case o.live.device != "":
				if several || len(a) > 0 || o.writable || o.overlay != "" || o.limit != "" || o.disk != -1 {
					return usageError{errors.New("export: --live takes no point, and no flags of points")}
				}
				return o.runLive(c, g)
			case o.live.given():
				return usageError{errors.New("export: --since, --commit and --commit-on-disconnect go with --live")}
			case several && len(a) > 0:
				return usageError{errors.New("export: give NAME@POINT, or --all or --vm")}
			case several:
				return o.runAll(c, g)
			case len(a) == 0:
				return usageError{errors.New("export: give NAME@POINT, or --all or --vm")}
			}
			return o.run(c, g, a[0])
		},
	}
	o.addFlags(c)
	f := c.Flags()
	f.BoolVar(&o.all, "all", false, "all points of all machines")
	f.StringArrayVar(&o.vms, "vm", nil, "all points of this machine; may be given several times")
	o.live.flags(c)
	f.IntVar(&o.disk, "disk", -1, "only this disk of the point")
	f.BoolVar(&o.writable, "writable", false, "let clients write, into an overlay")
	f.StringVar(&o.limit, "overlay-limit", "", "how much an overlay may hold, such as 20GiB: past it writes fail with \"no space left\"")
	f.StringVar(&o.overlay, "overlay", "", "file that keeps what is written, made if it is not there; with more than one disk, .diskN is added")
	return c
}

type exportOptions struct {
	serverOptions
	overlay, limit string
	limitBytes     int64
	disk           int
	writable       bool
	all            bool
	vms            []string
	live           liveOptions
}

func (o exportOptions) run(c *cobra.Command, g *globals, ref string) (err error) {
	if err := o.check("export"); err != nil {
		return err
	}
	if err := o.checkOverlay("export"); err != nil {
		return err
	}
	ctx := c.Context()
	cat, repo, p, err := g.bootable(c, ref)
	if err != nil {
		return err
	}
	toClose := closers{repo}
	defer func() { err = errors.Join(err, toClose.Close()) }()
	disks, err := chooseDisks(p, o.disk)
	if err != nil {
		return err
	}
	var exports []nbd.Export
	for _, i := range disks {
		e, opened, err := o.open(ctx, cat, p, i, len(disks) > 1)
		toClose = append(toClose, opened...)
		if err != nil {
			return err
		}
		exports = append(exports, e)
	}
	set, err := nbd.NewStatic(exports...)
	if err != nil {
		return err
	}
	name := ""
	if len(disks) > 1 {
		name = p.Disks[disks[0]].Name
	}
	mode := "read-only"
	if o.writable {
		mode = "writable"
	}
	return o.serve(c, g, set, name, fmt.Sprintf("%s@%s %s at ", p.VM, p.ID, mode))
}

// runAll serves the points of several machines.
func (o exportOptions) runAll(c *cobra.Command, g *globals) (err error) {
	if err := o.check("export"); err != nil {
		return err
	}
	if o.writable || o.overlay != "" || o.limit != "" || o.disk != -1 {
		return usageError{errors.New("export: --writable, --overlay, --overlay-limit and --disk go with one NAME@POINT")}
	}
	ctx := c.Context()
	cat, repo, err := g.catalog(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	known, err := cat.VMs(ctx)
	if err != nil {
		return err
	}
	var vms []string
	if !o.all {
		vms = o.vms
	}
	for _, vm := range o.vms {
		if !slices.Contains(known, vm) {
			return fmt.Errorf("export: %w: no points of %s", restore.ErrNotFound, vm)
		}
	}
	name := "NAME@latest"
	if shown := cmp.Or(strings.Join(vms, " "), strings.Join(known, " ")); shown != "" {
		name = strings.Fields(shown)[0] + "@latest"
	}
	return o.serve(c, g, nbd.NewPoints(cat, vms...), name, fmt.Sprintf("all points of %s read-only, such as ", cmp.Or(strings.Join(vms, ", "), "all machines")))
}

// serve serves exports until ctx ends, after it has said where.
func (o *exportOptions) serve(c *cobra.Command, g *globals, exports nbd.Exports, name, what string) error {
	srv, err := o.server(exports)
	if err != nil {
		return err
	}
	ctx := c.Context()
	l, where, err := o.bind(ctx, name)
	if err != nil {
		return err
	}
	if !g.quiet {
		_, _ = fmt.Fprintf(c.OutOrStdout(), "%s%s\n", what, where)
	}
	o.warnOpen(c, g, l)
	return srv.Serve(ctx, l)
}

// warnOpen says if anybody may read what is served at l.
func (o *exportOptions) warnOpen(c *cobra.Command, g *globals, l net.Listener) {
	if err := o.openToAll(l); err != nil && !g.quiet {
		_, _ = fmt.Fprintf(c.ErrOrStderr(), "tidemark: %s: %v\n", l.Addr(), err)
	}
}

// checkOverlay reads the flags that are about the overlay.
func (o *exportOptions) checkOverlay(command string) error {
	if o.overlay != "" && !o.writable {
		return usageError{errors.New(command + ": --overlay goes with --writable")}
	}
	if o.limit != "" {
		n, err := humanize.ParseBytes(o.limit)
		if err != nil || n > math.MaxInt64 || !o.writable {
			return usageError{fmt.Errorf("%s: --overlay-limit %s: a size such as 20GiB, together with --writable", command, o.limit)}
		}
		o.limitBytes = int64(n)
	}
	return nil
}

// open opens disk i for being served. What it returns is to be closed, also after an error.
func (o exportOptions) open(ctx context.Context, cat *restore.Catalog, p *restore.PointDetails, i int, several bool) (nbd.Export, closers, error) {
	d, closer, err := cat.Open(ctx, p, i)
	if err != nil {
		return nbd.Export{}, nil, err
	}
	opened := closers{closer}
	e := nbd.Export{Name: p.Disks[i].Name, Description: p.VM + "@" + p.ID + " " + p.Disks[i].Name, Disk: d, ReadOnly: !o.writable,
		History: nbd.NewHistory(cat, p, p.Disks[i].Name)}
	if o.writable {
		ov, err := o.openOverlay(cat, p, i, several, d)
		if err != nil {
			return nbd.Export{}, opened, err
		}
		opened = append(opened, ov)
		e.Disk = ov
	}
	return e, opened, nil
}

// openOverlay opens or makes the overlay of disk i.
func (o exportOptions) openOverlay(cat *restore.Catalog, p *restore.PointDetails, i int, several bool, base restore.Disk) (ov *restore.Overlay, err error) {
	id := cat.Identity(p, i)
	if o.overlay == "" {
		ov, err = newScratch(base, id)
	} else {
		ov, err = restore.OpenOrCreateOverlay(o.overlayFile(p, i, several), base, id)
	}
	if err != nil {
		return nil, err
	}
	if o.limit != "" {
		if err := ov.Limit(o.limitBytes); err != nil {
			return nil, errors.Join(err, ov.Close())
		}
	}
	return ov, nil
}

// overlayFile is the overlay's file of disk i.
func (o exportOptions) overlayFile(p *restore.PointDetails, i int, several bool) string {
	if several {
		return o.overlay + "." + p.Disks[i].Name
	}
	return o.overlay
}

func chooseDisks(p *restore.PointDetails, disk int) ([]int, error) {
	if disk >= len(p.Disks) || disk < -1 {
		return nil, usageError{fmt.Errorf("--disk %d: %s@%s has %d disks, counted from 0", disk, p.VM, p.ID, len(p.Disks))}
	}
	if disk >= 0 {
		return []int{disk}, nil
	}
	all := make([]int, len(p.Disks))
	for i := range all {
		all[i] = i
	}
	return all, nil
}

// newScratch makes an overlay whose file has no name: it is gone when it is closed, or when the
// process ends, however that comes.
func newScratch(base restore.Disk, identity string) (*restore.Overlay, error) {
	dir, err := os.MkdirTemp("", "tidemark-overlay-")
	if err != nil {
		return nil, err
	}
	ov, err := restore.CreateOverlay(filepath.Join(dir, "overlay"), base, identity)
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		if ov != nil {
			err = errors.Join(err, ov.Close())
		}
		return nil, err
	}
	return ov, nil
}
