package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
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
		Use:   "export NAME@POINT | --all | --vm NAME -r REPO --socket PATH | --listen ADDR",
		Short: "Serve the disks of restore points over NBD",
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
  nbdinfo --map=qemu:dirty-bitmap:3f2a 'nbd+unix:///web1@latest/disk0?socket=/run/points.sock'`,
		Args: args(0, 1),
		RunE: func(c *cobra.Command, a []string) error {
			switch several := o.all || len(o.vms) > 0; {
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
}

func (o exportOptions) run(c *cobra.Command, g *globals, ref string) (err error) {
	if err := o.check("export"); err != nil {
		return err
	}
	if o.overlay != "" && !o.writable {
		return usageError{errors.New("export: --overlay goes with --writable")}
	}
	if o.limit != "" {
		n, err := humanize.ParseBytes(o.limit)
		if err != nil || n > math.MaxInt64 || !o.writable {
			return usageError{fmt.Errorf("export: --overlay-limit %s: a size such as 20GiB, together with --writable", o.limit)}
		}
		o.limitBytes = int64(n)
	}
	ctx := c.Context()
	cat, repo, err := g.catalog(ctx)
	if err != nil {
		return err
	}
	closers := []io.Closer{repo}
	defer func() {
		for i := len(closers) - 1; i >= 0; i-- {
			err = errors.Join(err, closers[i].Close())
		}
	}()
	p, err := cat.FindBootable(ctx, ref)
	if err != nil {
		return err
	}
	warnDamaged(c, p.VM+"@"+p.ID, p.Damage)
	disks, err := chooseDisks(p, o.disk)
	if err != nil {
		return err
	}
	var exports []nbd.Export
	for _, i := range disks {
		d, closer, err := cat.Open(ctx, p, i)
		if err != nil {
			return err
		}
		closers = append(closers, closer)
		e := nbd.Export{Name: p.Disks[i].Name, Description: p.VM + "@" + p.ID + " " + p.Disks[i].Name, Disk: d, ReadOnly: !o.writable,
			History: nbd.NewHistory(cat, p, p.Disks[i].Name)}
		if o.writable {
			ov, err := o.openOverlay(cat, p, i, len(disks) > 1, d)
			if err != nil {
				return err
			}
			closers = append(closers, ov)
			e.Disk = ov
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
		if err := o.openToAll(l); err != nil {
			_, _ = fmt.Fprintf(c.ErrOrStderr(), "tidemark: %s: %v\n", l.Addr(), err)
		}
	}
	return srv.Serve(ctx, l)
}

// closingDisk is a disk that was opened for the export.
type closingDisk interface {
	restore.WritableDisk
	io.Closer
}

// openOverlay opens or makes the overlay of disk i.
func (o exportOptions) openOverlay(cat *restore.Catalog, p *restore.PointDetails, i int, several bool, base restore.Disk) (_ closingDisk, err error) {
	id := cat.Identity(p, i)
	var d closingDisk
	var ov *restore.Overlay
	if o.overlay == "" {
		s, err := newScratch(base, id)
		if err != nil {
			return nil, err
		}
		d, ov = s, s.Overlay
	} else {
		file := o.overlay
		if several {
			file += "." + p.Disks[i].Name
		}
		if ov, err = restore.OpenOrCreateOverlay(file, base, id); err != nil {
			return nil, err
		}
		d = ov
	}
	if o.limit != "" {
		if err := ov.Limit(o.limitBytes); err != nil {
			return nil, errors.Join(err, d.Close())
		}
	}
	return d, nil
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

// scratch is an overlay whose file goes when it is closed.
type scratch struct {
	*restore.Overlay
	dir string
}

func (s scratch) Close() error { return errors.Join(s.Overlay.Close(), os.RemoveAll(s.dir)) }

func newScratch(base restore.Disk, identity string) (_ scratch, err error) {
	dir, err := os.MkdirTemp("", "tidemark-overlay-")
	if err != nil {
		return scratch{}, err
	}
	ov, err := restore.CreateOverlay(filepath.Join(dir, "overlay"), base, identity)
	if err != nil {
		return scratch{}, errors.Join(err, os.RemoveAll(dir))
	}
	return scratch{ov, dir}, nil
}
