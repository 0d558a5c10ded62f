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
		d, closer, err := cat.Open(ctx, p, i)
		if err != nil {
			return err
		}
		closers = append(closers, closer)
		e := nbd.Export{Name: p.Disks[i].Name, Description: p.VM + "@" + p.ID + " " + p.Disks[i].Name, Disk: d, ReadOnly: !o.writable}
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
