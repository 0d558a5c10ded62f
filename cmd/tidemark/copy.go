package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/store"
)

func newCopy(g *globals) *cobra.Command {
	var to string
	var other globals // its keys
	var all bool
	c := &cobra.Command{
		Use:   "copy NAME[@POINT]... | --all --to REPO -r REPO",
		Short: "Copy restore points to another repository",
		Long: `Copy restore points to another repository: only what is missing there is sent. Points that
are there already are passed over, so that the same command again, or after an interruption, sends
what is new. Every byte is checked on the way; a damaged point is not copied.

The keys of the other repository are its own: a file, or asked for on the terminal. Where
the two have different keys, all that differs from the point before must be read to
find out what is missing.`,
		Example: `  tidemark copy --all --to /mnt/usb/backup -r /srv/backup
  tidemark copy web1@latest web2 --to /mnt/usb/backup -r /srv/backup`,
		Args: args(0, -1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			if all == (len(a) > 0) || to == "" {
				return usageError{errors.New("name VMs or points, or give --all; and --to REPO")}
			}
			from, err := g.open(c.Context())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, from.Close()) }()
			if err := from.CanRead(); err != nil {
				return err
			}
			dest, err := other.openOther(c.Context(), to)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, dest.Close()) }()
			names, err := namesOf(c.Context(), from, a)
			if err != nil {
				return err
			}
			byVM := map[string][]store.PointName{}
			var vms []string // in the order in which they are named
			for _, n := range names {
				if byVM[n.VM] == nil {
					vms = append(vms, n.VM)
				}
				byVM[n.VM] = append(byVM[n.VM], n)
			}
			var sum store.CopyReport
			sum.Points = []store.PointName{}
			for _, vm := range vms {
				bar := g.progress()
				var r store.CopyReport
				r, err = from.Copy(c.Context(), dest, byVM[vm], func(n store.PointName, done, total int64) { bar.bytes(n.VM+" "+clock(n.Time), done, total) })
				bar.end()
				sum.Points = append(sum.Points, r.Points...)
				sum.Present += r.Present
				sum.Grains += r.Grains
				sum.Sent += r.Sent
				sum.Stored += r.Stored
				if err != nil {
					break
				}
			}
			if g.json {
				return errors.Join(err, printJSON(c.OutOrStdout(), sum))
			}
			if !g.quiet {
				_, perr := fmt.Fprintf(c.OutOrStdout(), "%d points copied, %d were there; %d grains differed, %d were sent, %s stored\n",
					len(sum.Points), sum.Present, sum.Grains, sum.Sent, size(sum.Stored))
				err = errors.Join(err, perr)
			}
			return err
		},
	}
	c.Flags().StringVar(&to, "to", "", "the other repository")
	c.Flags().StringVar(&other.keyFile, "to-key-file", "", "key file of the other repository")
	c.Flags().StringVar(&other.passphraseFile, "to-passphrase-file", "", "file with the passphrase of the other repository")
	c.Flags().BoolVar(&other.encrypted, "to-encrypted", false, "refuse the other repository if it says that it is not encrypted")
	c.Flags().BoolVar(&all, "all", false, "all points of all VMs")
	return c
}

// openOther opens a second repository by flags of its own: variables are for the first.
func (g *globals) openOther(ctx context.Context, where string) (*store.Repo, error) {
	if g.keyFile == "" && g.passphraseFile == "" {
		return g.openAsking(ctx, where, "passphrase of "+where+": ")
	}
	return g.openAt(ctx, where)
}
