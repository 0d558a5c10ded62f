package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/store"
)

func newPoints(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "points [NAME] -r REPO",
		Short: "List restore points",
		Example: `  tidemark points -r /srv/backup
  tidemark points web1 -r /srv/backup --json`,
		Args: args(0, 1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			ctx := c.Context()
			repo, err := g.open(ctx)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			vms := a
			if len(vms) == 0 {
				if vms, err = repo.VMs(ctx); err != nil {
					return err
				}
			}
			points := []*store.Point{}
			var bad []error
			for _, vm := range vms {
				names, err := repo.Points(ctx, vm)
				if err != nil {
					return err
				}
				if len(names) == 0 && len(a) > 0 {
					return fmt.Errorf("%s: %w: it has no restore point", vm, store.ErrNotFound)
				}
				for _, n := range names {
					p, err := repo.Point(ctx, n)
					if err != nil {
						bad = append(bad, err) // the others are good still
						continue
					}
					points = append(points, p)
				}
			}
			if g.json {
				return errors.Join(append(bad, printJSON(c.OutOrStdout(), points))...)
			}
			t := newTable(c.OutOrStdout(), "POINT", "TIME", "DISKS", "MODE", "CHANGED", "READ", "STORED", "PAUSED", "CONSISTENCY")
			for _, p := range points {
				s := agent.Sum(p)
				var total int64
				for _, d := range p.Disks {
					total += d.Root.Size
				}
				t.row(p.VM+"@"+p.ID, clock(p.Time), fmt.Sprintf("%d × %s", len(p.Disks), size(total)), modes(p), size(s.Changed),
					size(s.Read), size(s.Stored), short(p.Quiesce.Paused), string(p.Consistency))
			}
			return errors.Join(append(bad, t.flush())...)
		},
	}
}
