package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/store"
)

func newExport(g *globals) *cobra.Command {
	var o exportOptions
	c := &cobra.Command{
		Use:   "export NAME@POINT -r REPO --socket PATH | --listen ADDR",
		Short: "Serve the disks of a restore point over NBD",
		Long: `Serve the disks of a restore point over NBD, as exports called disk0, disk1, ...; a
client that names none gets the only one. POINT is latest, the start of an ID, or a
time; only an ID leads to a point that "tidemark repair" found to be damaged.

With --writable a client may write: what it writes goes into an overlay, and the
point stays as it is. The overlay is a file that --overlay names and that can be used
again, or a temporary one that is gone when the export ends. It takes space for what is
written and gives back what is discarded; --overlay-limit bounds it, per disk.

Anyone who can reach a TCP address given with --listen can read the disks.`,
		Example: `  tidemark export web1@latest -r /srv/backup --socket /run/web1.sock --writable --overlay web1.overlay
  qemu-system-x86_64 -m 2G -blockdev driver=nbd,node-name=d0,server.type=unix,server.path=/run/web1.sock \
    -device virtio-blk-pci,drive=d0
  tidemark export web1@3f2a -r /srv/backup --listen 127.0.0.1:10809
  nbdcopy nbd://127.0.0.1 web1.raw`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) error { return o.run(c, g, a[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.socket, "socket", "", "unix socket to make and listen on")
	f.StringVar(&o.listen, "listen", "", "TCP address to listen on, such as 127.0.0.1:10809")
	f.IntVar(&o.disk, "disk", -1, "only this disk of the point")
	f.BoolVar(&o.writable, "writable", false, "let clients write, into an overlay")
	f.StringVar(&o.limit, "overlay-limit", "", "how much an overlay may hold, such as 20GiB: past it writes fail with \"no space left\"")
	f.StringVar(&o.overlay, "overlay", "", "file that keeps what is written, made if it is not there; with more than one disk, .diskN is added")
	return c
}

type exportOptions struct {
	socket, listen, overlay, limit string
	limitBytes                     int64
	disk                           int
	writable                       bool
}

func (o exportOptions) run(c *cobra.Command, g *globals, ref string) (err error) {
	if (o.socket == "") == (o.listen == "") {
		return usageError{errors.New("export: give --socket PATH or --listen ADDR")}
	}
	if err := o.checkOverlay("export"); err != nil {
		return err
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
	p, err := findBootable(ctx, cat, ref)
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
		e, opened, err := o.open(ctx, cat, p, i, len(disks) > 1)
		closers = append(closers, opened...)
		if err != nil {
			return err
		}
		exports = append(exports, e)
	}
	set, err := nbd.NewStatic(exports...)
	if err != nil {
		return err
	}
	l, where, err := o.bind(ctx, disks, p)
	if err != nil {
		return err
	}
	if !g.quiet {
		mode := "read-only"
		if o.writable {
			mode = "writable"
		}
		_, _ = fmt.Fprintf(c.OutOrStdout(), "%s@%s %s at %s\n", p.VM, p.ID, mode, where)
	}
	srv := &nbd.Server{Exports: set, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))}
	return srv.Serve(ctx, l)
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

// open opens disk i for being served. What it returns to be closed, last one first, is so also after an error.
func (o exportOptions) open(ctx context.Context, cat *restore.Catalog, p *restore.PointDetails, i int, several bool) (nbd.Export, []io.Closer, error) {
	d, closer, err := cat.Open(ctx, p, i)
	if err != nil {
		return nbd.Export{}, nil, err
	}
	closers := []io.Closer{closer}
	e := nbd.Export{Name: p.Disks[i].Name, Description: p.VM + "@" + p.ID + " " + p.Disks[i].Name, Disk: d, ReadOnly: !o.writable}
	if o.writable {
		ov, err := o.openOverlay(cat, p, i, several, d)
		if err != nil {
			return nbd.Export{}, closers, err
		}
		closers = append(closers, ov)
		e.Disk = ov
	}
	return e, closers, nil
}

func (o exportOptions) bind(ctx context.Context, disks []int, p *restore.PointDetails) (net.Listener, string, error) {
	network, addr := "unix", o.socket
	if o.listen != "" {
		network, addr = "tcp", o.listen
	}
	l, err := nbd.Listen(ctx, network, addr)
	if err != nil {
		return nil, "", err
	}
	name := ""
	if len(disks) > 1 {
		name = p.Disks[disks[0]].Name
	}
	if network == "unix" {
		return l, "nbd+unix:///" + name + "?socket=" + absolute(o.socket), nil
	}
	return l, "nbd://" + l.Addr().String() + "/" + name, nil
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

// findBootable finds a point to run a machine from. One that shows no single
// instant, or is known to be damaged, has to be asked for by its ID.
func findBootable(ctx context.Context, cat *restore.Catalog, ref string) (*restore.PointDetails, error) {
	p, err := cat.Find(ctx, ref)
	if err != nil {
		return nil, err
	}
	_, point, _ := strings.Cut(ref, "@")
	byID := len(point) >= 4 && strings.HasPrefix(p.ID, point)
	if p.Damage != nil && !byID {
		return nil, fmt.Errorf("%s is %s@%s, which is damaged: choose another point, or name it by its ID", ref, p.VM, p.ID)
	}
	if p.Consistency == string(store.None) && !byID {
		return nil, fmt.Errorf("%s is %s@%s, which was read while it was written and shows no single instant: choose another point, or name it by its ID", ref, p.VM, p.ID)
	}
	return p, nil
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
