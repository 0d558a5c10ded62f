package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/store"
)

func newGC(g *globals) *cobra.Command {
	var o store.GCOptions
	var percent float64
	c := &cobra.Command{
		Use:   "gc -r REPO",
		Short: "Give back the space of what no restore point needs",
		Long: `Delete what no restore point needs: what forgotten points and aborted backups left. Packs
that are partly needed are compacted.

It runs beside backups, restores and mounts, and may be stopped at any moment. What running backups may
still need is left to the next run, or waited for with --wait. A backup that died on another
host blocks that for 7 days: --give-up ends it before; if it runs all the same, it
fails when it commits and has to be made again.

If any restore point cannot be followed to its end, nothing is deleted.`,
		Example: `  tidemark gc -r /srv/backup
  tidemark gc --dry-run -r /srv/backup
  tidemark gc --wait 1h --give-up 24h -r /srv/backup`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if percent < 0 || percent > 100 {
				return usageError{errors.New("--garbage is a percentage")}
			}
			o.Garbage = max(percent/100, 1e-9)
			repo, err := g.open(c.Context())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			bar := g.progress()
			o.Progress = bar.count
			r, err := repo.GC(c.Context(), o)
			bar.end()
			if err != nil {
				return err
			}
			if g.json {
				err = printJSON(c.OutOrStdout(), r)
			} else if !g.quiet {
				err = printGC(c, r)
			}
			if err == nil && len(r.Damaged) > 0 {
				err = errProblems
			}
			return err
		},
	}
	f := c.Flags()
	f.BoolVarP(&o.DryRun, "dry-run", "n", false, "show what is garbage, delete nothing")
	f.Float64Var(&percent, "garbage", 100*store.DefaultGarbage, "compact packs of which so many `PERCENT` are garbage")
	f.DurationVar(&o.Wait, "wait", 0, "wait so long for running backups to end")
	f.DurationVar(&o.Patience, "give-up", 0, "take backups for dead that began so long ago (default: 7 days, or when their process is gone)")
	return c
}

func printGC(c *cobra.Command, r store.GCReport) error {
	out := c.OutOrStdout()
	verb := "deleted"
	if r.DryRun {
		verb = "would be deleted"
	}
	_, err := fmt.Fprintf(out, "%d points followed, %d packs of %s; garbage: %s\n%d packs %s, %d compacted, %s freed\n",
		r.Points, r.Packs, size(r.Bytes), size(r.Garbage), r.Deleted, verb, r.Compacted, size(r.Freed))
	for _, s := range r.GivenUp {
		_, _ = fmt.Fprintf(out, "given up: %s\n", s)
	}
	for _, s := range r.Waiting {
		_, _ = fmt.Fprintf(out, "still running: %s\n", s)
	}
	if r.Left > 0 {
		_, _ = fmt.Fprintf(out, "%d packs are left to the next run\n", r.Left)
	}
	for _, s := range r.Damaged {
		_, _ = fmt.Fprintf(out, "DAMAGED, left alone: %s\n", s)
	}
	return err
}
