package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/restore"
)

func newRestore(g *globals) *cobra.Command {
	var o restore.WriteOptions
	var target string
	var disk int
	c := &cobra.Command{
		Use:   "restore NAME@POINT -r REPO -o FILE|DEVICE",
		Short: "Write a disk of a restore point to a file or device",
		Long: `Write a disk of a restore point to a sparse raw file or to a block device. A file
appears under its name only when it is complete. POINT is latest, the start of an ID, or
a time. Every byte is checked against its hash on the way.`,
		Example: `  tidemark restore web1@latest -r /srv/backup -o web1.raw
  tidemark restore web1@2026-11-22T18-30-00Z -r /srv/backup --disk 1 -o /dev/vg0/web1-data`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			if target == "" {
				return usageError{errors.New("restore: give -o FILE or -o DEVICE")}
			}
			ctx, begin := c.Context(), time.Now()
			cat, repo, err := g.catalog(ctx)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			p, err := findBootable(ctx, cat, a[0])
			if err != nil {
				return err
			}
			if disk < 0 && len(p.Disks) > 1 {
				return usageError{fmt.Errorf("restore: %s@%s has %d disks: give --disk 0 to --disk %d", p.VM, p.ID, len(p.Disks), len(p.Disks)-1)}
			}
			disks, err := chooseDisks(p, max(disk, 0))
			if err != nil {
				return err
			}
			d, closer, err := cat.Open(ctx, p, disks[0])
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closer.Close()) }()
			bar := g.progress()
			o.Progress = func(done, total int64) { bar.bytes("restoring", done, total) }
			r, err := restore.WriteTo(ctx, d, target, o)
			bar.end()
			if err != nil {
				return err
			}
			if g.json {
				return printJSON(c.OutOrStdout(), struct {
					VM     string `json:"vm"`
					Point  string `json:"point"`
					Disk   string `json:"disk"`
					Target string `json:"target"`
					restore.WriteResult
				}{p.VM, p.ID, p.Disks[disks[0]].Name, target, r})
			}
			if !g.quiet {
				_, err = fmt.Fprintf(c.OutOrStdout(), "%s@%s %s restored to %s: %s data, %s zeroes, took %s\n", p.VM, p.ID, p.Disks[disks[0]].Name, target,
					size(r.Data), size(r.Zero), short(time.Since(begin)))
			}
			return err
		},
	}
	c.Flags().StringVarP(&target, "output", "o", "", "file to make, or block device to overwrite")
	c.Flags().IntVar(&disk, "disk", -1, "which disk of the point, counted from 0")
	c.Flags().BoolVar(&o.Force, "force", false, "replace a file that exists")
	return c
}
