package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/store"
)

func newStats(g *globals) *cobra.Command {
	var each bool
	c := &cobra.Command{
		Use:   "stats -r REPO",
		Short: "Show what takes the space of a repository",
		Long: `Show what the repository holds: the disks of all points, their data without zeroes, the
different content of it, what that takes when compressed, and garbage. UNIQUE is what forgetting all of a VM's
points, or just this point, would free.`,
		Example: "  tidemark stats -r /srv/backup\n  tidemark stats --points --json -r /srv/backup",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			repo, err := g.open(c.Context())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			bar := g.progress()
			s, err := repo.Stats(c.Context(), each, func(done, total int64) { bar.count("reading maps of points", done, total) })
			bar.end()
			if err != nil {
				return err
			}
			if g.json {
				err = printJSON(c.OutOrStdout(), struct {
					store.RepoStats
					Dedup       float64 `json:"dedup_ratio"`
					Compression float64 `json:"compression_ratio"`
				}{s, s.Dedup(), s.Compression()})
			} else {
				err = printStats(c, s)
			}
			if err == nil && len(s.Damaged) > 0 {
				err = errProblems
			}
			return err
		},
	}
	c.Flags().BoolVar(&each, "points", false, "show each point")
	return c
}

func printStats(c *cobra.Command, s store.RepoStats) error {
	out := c.OutOrStdout()
	t := newTable(out, "NAME", "POINTS", "DISKS", "DATA", "UNIQUE")
	row := func(name string, u store.UseStats) {
		t.row(name, fmt.Sprint(u.Points), size(u.Logical), size(u.Data), size(u.Unique))
	}
	for _, v := range s.VMs {
		row(v.VM, v)
		for _, p := range s.EachPoint {
			if p.VM == v.VM {
				row("  "+p.Point.String(), p)
			}
		}
	}
	if err := t.flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, `
data of all points      %s
different content       %s  (deduplication %.2f×)
stored                  %s  (compression %.2f×; maps %s)
garbage                 %s
packs                   %d, %s
`, size(s.Data), size(s.Content), s.Dedup(), size(s.Stored), s.Compression(), size(s.Maps), size(s.Garbage), s.Packs, size(s.PackBytes))
	for _, d := range s.Damaged {
		_, _ = fmt.Fprintf(out, "DAMAGED: %s\n", d)
	}
	return err
}
