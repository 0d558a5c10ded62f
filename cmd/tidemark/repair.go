package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/store"
)

func newRepair(g *globals) *cobra.Command {
	var o store.RepairOptions
	c := &cobra.Command{
		Use:   "repair [NAME[@POINT]] -r REPO",
		Short: "Heal what has a good copy, and note what is lost",
		Long: `Verify restore points, and heal what is damaged in them from good copies: whatever in the
repository has the same hash, read and checked. Other points that share it are healed too.

What has no good copy is listed, and its points are noted as damaged: "latest" and times pass
over them, only their ID leads to them. The next backup reads what was lost from the
disk once more, so it is whole; and what it then stores heals older points, if they
held the same: run repair again.

It needs a full key, and the right to delete. It runs beside backups and readers, not
beside gc, and may be stopped at any moment. Objects that are replaced although something in
them may be what is lost are kept below salvage/, for you to delete.

It ends with 5 if anything is lost.`,
		Example: `  tidemark repair -r /srv/backup --dry-run
  tidemark repair -r /srv/backup
  tidemark repair web1@latest -r /srv/backup`,
		Args: args(0, 1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			repo, err := g.open(c.Context())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			// By names: a point whose document is damaged is to be found too.
			names, err := namesOf(c.Context(), repo, a)
			if err != nil {
				return err
			}
			bar := g.progress()
			o.Progress = func(phase string, done, total int64) {
				if strings.HasPrefix(phase, "verifying") {
					bar.bytes(phase, done, total)
				} else {
					bar.count(phase, done, total)
				}
			}
			r, err := repo.Repair(c.Context(), names, o)
			bar.end()
			if err != nil {
				return err
			}
			if g.json {
				err = printJSON(c.OutOrStdout(), r)
			} else {
				err = printRepair(c, g.quiet, r)
			}
			if err == nil && r.Lost() {
				err = errProblems
			}
			return err
		},
	}
	f := c.Flags()
	f.BoolVarP(&o.DryRun, "dry-run", "n", false, "show what is damaged and what could be healed, change nothing")
	f.BoolVar(&o.Quick, "quick", false, "don't read the data of points that are not known to be damaged")
	f.BoolVar(&o.DiscardDamaged, "discard-damaged", false, "don't keep replaced objects below salvage/")
	return c
}

func printRepair(c *cobra.Command, quiet bool, r store.RepairReport) (err error) {
	say := func(format string, v ...any) {
		_, werr := fmt.Fprintf(c.OutOrStdout(), format, v...)
		err = errors.Join(err, werr)
	}
	healed, healable := "healed", "good copies of %d records were put into %s"
	if r.DryRun {
		healed, healable = "can be healed", "%d records can be healed, by %s"
	}
	for _, p := range r.Packs {
		if quiet {
			break
		}
		say(healable+"\n", p.Healed, p.Object)
		for _, k := range p.Kept {
			say("  the damaged object is kept: %s\n", k)
		}
	}
	lost := false
	for i := range r.Points {
		p := &r.Points[i]
		switch {
		case len(p.Lost) > 0:
			lost = true
			say("%s  DAMAGED\n", p.Point)
		case p.Damaged():
			say("%s  %s\n", p.Point, healed)
		case !quiet:
			say("%s  good\n", p.Point)
		}
		for _, l := range p.Lost {
			if l.Disk == "" {
				say("  lost: the point itself: %s: %s\n", l.Object, l.What)
				continue
			}
			say("  lost: %s, bytes %d to %d: %s: %s\n", l.Disk, l.Off, l.Off+l.Len, l.Object, l.What)
		}
	}
	if lost && !r.DryRun && !quiet {
		say("The next backup reads what is lost from the disk again; after it, `tidemark repair` heals what older points shared.\n")
	}
	return err
}

// warnDamaged says what is known to be lost of a point that was asked for.
func warnDamaged(c *cobra.Command, point string, d *store.Damage) {
	if d == nil {
		return
	}
	_, _ = fmt.Fprintf(c.ErrOrStderr(), "tidemark: WARNING: %s is damaged: %s of it are lost, and reading them fails\n", point, size(d.Bytes()))
}
