package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/restore"
)

func newRestore(g *globals) *cobra.Command {
	var o restoreOptions
	c := &cobra.Command{
		Use:   "restore NAME@POINT -r REPO -o FILE|DEVICE",
		Short: "Write a disk of a restore point to a file or device",
		Long: `Write a disk of a restore point, or all of them, to files or a block device. POINT is
latest, the start of an ID, or a time; only an ID leads to a point that "tidemark repair" found
to be damaged. Every byte is checked against its hash on the way.

A file appears under its name only when it is complete. Raw files are sparse, and a restore
to one that was interrupted goes on when it is started again. The other formats are made
by qemu-img and begin anew: qcow2, vmdk (streamOptimized) and vhdx (dynamic). Without --format
the name of the file says which: .qcow2, .vmdk, .vhdx; all else is raw.

A device is read first, and only what differs is written; what the disk has as zeroes is
discarded where the device can. --in-place does the same to a raw file that exists, --force
replaces the file. While a device or a file is changed in place, its first MiB is
zero, so that it does not look like a disk when the restore is interrupted; start it
again, and only what is left is written.`,
		Example: `  tidemark restore web1@latest -r /srv/backup -o web1.raw
  tidemark restore web1@latest -r /srv/backup -o web1.qcow2 --verify
  tidemark restore web1@2026-11-22T18-30-00Z -r /srv/backup --disk 1 -o /dev/vg0/web1-data
  tidemark restore web1@latest -r /srv/backup -o /var/lib/libvirt/images/web1.img --in-place
  tidemark restore web1@latest -r /srv/backup --all-disks --format vmdk -o ./web1`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) error { return o.run(c, g, a[0]) },
	}
	f := c.Flags()
	f.StringVarP(&o.target, "output", "o", "", "file to make, or block device to overwrite; with --all-disks the folder for the files")
	f.IntVar(&o.disk, "disk", -1, "which disk of the point, counted from 0")
	f.BoolVar(&o.all, "all-disks", false, "all disks of the point, as files called after them in the folder of -o")
	f.StringVar(&o.format, "format", "", "raw, qcow2, vmdk or vhdx")
	f.BoolVar(&o.write.Force, "force", false, "replace a file that exists")
	f.BoolVar(&o.write.InPlace, "in-place", false, "change a raw file that exists where it differs; nothing else may have it open")
	f.BoolVar(&o.write.Blind, "no-compare", false, "write all of a device without reading it first")
	f.BoolVar(&o.write.ReadBack, "verify", false, "read all of it again when it is written, and compare")
	return c
}

type restoreOptions struct {
	target, format string
	disk           int
	all            bool
	write          restore.WriteOptions
}

// restored is a disk that was written, as --json says it.
type restored struct {
	VM     string `json:"vm"`
	Point  string `json:"point"`
	Disk   string `json:"disk"`
	Target string `json:"target"`
	Format string `json:"format"`
	restore.WriteResult
	Seconds float64 `json:"seconds"`
}

func (o *restoreOptions) check() error {
	switch {
	case o.target == "":
		return usageError{errors.New("restore: give -o FILE or -o DEVICE")}
	case o.format != "" && diskFormats[o.format] == nil:
		return usageError{fmt.Errorf("restore: --format %s: it is raw, qcow2, vmdk or vhdx", o.format)}
	case o.all && o.disk >= 0:
		return usageError{errors.New("restore: --disk and --all-disks exclude each other")}
	case o.write.Force && o.write.InPlace:
		return usageError{errors.New("restore: --force replaces a file, --in-place changes it: give one of them")}
	}
	return nil
}

func (o *restoreOptions) run(c *cobra.Command, g *globals, ref string) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	ctx := c.Context()
	cat, repo, p, err := g.bootable(c, ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	disks, err := o.choose(p)
	if err != nil {
		return err
	}
	done := []restored{}
	for _, i := range disks {
		target, format, err := o.place(p, i)
		if err != nil {
			return err
		}
		r, err := o.one(ctx, g, cat, p, i, target, format)
		if err != nil {
			return err
		}
		done = append(done, r)
		if !g.json && !g.quiet {
			if err := r.print(c.OutOrStdout()); err != nil {
				return err
			}
		}
	}
	switch {
	case g.json && o.all:
		return printJSON(c.OutOrStdout(), done)
	case g.json:
		return printJSON(c.OutOrStdout(), done[0])
	}
	return nil
}

func (o *restoreOptions) choose(p *restore.PointDetails) ([]int, error) {
	if o.all {
		return chooseDisks(p, -1)
	}
	if o.disk < 0 && len(p.Disks) > 1 {
		return nil, usageError{fmt.Errorf("restore: %s@%s has %d disks: give --all-disks, or --disk 0 to --disk %d", p.VM, p.ID, len(p.Disks), len(p.Disks)-1)}
	}
	return chooseDisks(p, max(o.disk, 0))
}

// place says where disk i goes, and as what.
func (o *restoreOptions) place(p *restore.PointDetails, i int) (target, format string, err error) {
	target, format = o.target, o.format
	if o.all {
		if format == "" {
			format = "raw"
		}
		if err := os.MkdirAll(target, 0o700); err != nil {
			return "", "", err
		}
		target = filepath.Join(target, p.Disks[i].Name+"."+format)
	}
	if format == "" {
		format = formatOf(target)
	}
	if format != "raw" && o.write.InPlace {
		return "", "", usageError{fmt.Errorf("restore: only a raw file can be changed in place, not %s", format)}
	}
	return target, format, nil
}

func (o *restoreOptions) one(ctx context.Context, g *globals, cat *restore.Catalog, p *restore.PointDetails, i int, target, format string) (_ restored, err error) {
	begin := time.Now()
	d, closer, err := cat.Open(ctx, p, i)
	if err != nil {
		return restored{}, err
	}
	defer func() { err = errors.Join(err, closer.Close()) }()
	name := ""
	if o.all {
		name = p.Disks[i].Name + ": "
	}
	bar := g.progress()
	w := o.write
	w.Progress = func(done, total int64) { bar.bytes(name+"restoring", done, total) }
	w.ReadingBack = func(done, total int64) { bar.bytes(name+"reading back", done, total) }
	var r restore.WriteResult
	if format == "raw" {
		r, err = restore.WriteTo(ctx, d, target, w)
	} else {
		r, err = convert(ctx, d, format, target, w)
	}
	bar.end()
	if err != nil {
		if errors.Is(err, os.ErrExist) && !w.Force {
			err = fmt.Errorf("%w: --force replaces it", err)
			if format == "raw" {
				err = fmt.Errorf("%w, --in-place changes it where it differs", err)
			}
			return restored{}, err
		}
		if _, serr := os.Lstat(restore.Partial(target)); serr == nil && format == "raw" {
			err = fmt.Errorf("%w\nwhat is written stays in %s: the same command goes on with it, or delete it", err, restore.Partial(target))
		}
		return restored{}, err
	}
	return restored{
		VM: p.VM, Point: p.ID, Disk: p.Disks[i].Name, Target: target, Format: format,
		WriteResult: r, Seconds: time.Since(begin).Seconds(),
	}, nil
}

func (r restored) print(w io.Writer) error {
	same := ""
	if r.Written != r.Data {
		same = fmt.Sprintf(" (%s written, the rest was there)", size(r.Written))
	}
	_, err := fmt.Fprintf(w, "%s@%s %s restored to %s: %s data, %s zeroes%s, took %s\n", r.VM, r.Point, r.Disk, r.Target,
		size(r.Data), size(r.Zero), same, short(time.Duration(r.Seconds*float64(time.Second))))
	return err
}
