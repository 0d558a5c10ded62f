package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/store"
)

func newPoints(g *globals) *cobra.Command {
	var evidence bool
	c := &cobra.Command{
		Use:   "points [NAME[@POINT]] -r REPO",
		Short: "List restore points, and what their completeness rests on",
		Long: `List restore points.

--evidence shows, for each disk, how it was decided what to read, and the proof: which
programs were attached from when on, how many events they missed, what they counted
beside the kernel's own statistics, and who wrote.

BOOT is what the last "tidemark boot --verify" found: booted, failed or unknown. NAME@proven is the
newest point that booted.

DAMAGE is what "tidemark repair" found to be lost. "verify" looks whether there is more.`,
		Example: `  tidemark points -r /srv/backup
  tidemark points web1 -r /srv/backup --json
  tidemark points web1@latest --evidence -r /srv/backup`,
		Args: args(0, 1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			ctx := c.Context()
			repo, err := g.open(ctx)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			points, bad, err := listPoints(ctx, repo, a)
			if err != nil {
				return err
			}
			known, err := knownOf(ctx, points, repo.Damages)
			if err != nil {
				return err
			}
			checks, err := knownOf(ctx, points, repo.Checks)
			if err != nil {
				return err
			}
			if g.json {
				listed := make([]listedPoint, len(points))
				for i, p := range points {
					listed[i] = listedPoint{p, known[p.Name()], checks[p.Name()]}
				}
				return errors.Join(append(bad, printJSON(c.OutOrStdout(), listed))...)
			}
			if evidence {
				for _, p := range points {
					bad = append(bad, printEvidence(c.OutOrStdout(), p))
				}
				return errors.Join(bad...)
			}
			t := newTable(c.OutOrStdout(), "POINT", "TIME", "DISKS", "MODE", "CHANGED", "READ", "STORED", "PAUSED", "CONSISTENCY", "BOOT", "DAMAGE")
			for _, p := range points {
				s := agent.Sum(p)
				var total int64
				for _, d := range p.Disks {
					total += d.Root.Size
				}
				t.row(p.VM+"@"+p.ID, clock(p.Time), fmt.Sprintf("%d × %s", len(p.Disks), size(total)), modes(p), size(s.Changed),
					size(s.Read), size(s.Stored), short(p.Quiesce.Paused), string(p.Consistency), verdictOf(checks[p.Name()]), lostOf(known[p.Name()]))
			}
			return errors.Join(append(bad, t.flush())...)
		},
	}
	c.Flags().BoolVar(&evidence, "evidence", false, "show what the completeness of each point rests on")
	return c
}

// listedPoint is a point with what is known of it.
type listedPoint struct {
	*store.Point
	Damage *store.Damage `json:"damage,omitempty"`
	Check  *store.Check  `json:"check,omitempty"` // the newest
}

func verdictOf(c *store.Check) string {
	if c == nil {
		return "-"
	}
	return c.Verdict
}

func lostOf(d *store.Damage) string {
	if d == nil {
		return "-"
	}
	return size(d.Bytes()) + " lost"
}

// knownOf asks of, once for each VM, what is known of the points of it.
func knownOf[T any](ctx context.Context, points []*store.Point, of func(ctx context.Context, vm string) (map[store.PointName]T, error)) (map[store.PointName]*T, error) {
	known, asked := map[store.PointName]*T{}, map[string]bool{}
	for _, p := range points {
		if asked[p.VM] {
			continue
		}
		asked[p.VM] = true
		some, err := of(ctx, p.VM)
		if err != nil {
			return nil, err
		}
		for n, v := range some {
			known[n] = &v
		}
	}
	return known, nil
}

// listPoints reads the points that a names: of all VMs, of one, or one of one. Those that
// can't be read come back as errors of their own.
func listPoints(ctx context.Context, repo *store.Repo, a []string) (points []*store.Point, bad []error, err error) {
	points = []*store.Point{}
	vms := a
	if len(vms) == 0 {
		if vms, err = repo.VMs(ctx); err != nil {
			return nil, nil, err
		}
	}
	for _, vm := range vms {
		if strings.Contains(vm, "@") {
			p, err := repo.Find(ctx, vm)
			if err != nil {
				return nil, nil, err
			}
			points = append(points, p)
			continue
		}
		names, err := repo.Points(ctx, vm)
		if err != nil {
			return nil, nil, err
		}
		if len(names) == 0 && len(a) > 0 {
			return nil, nil, fmt.Errorf("%s: %w: it has no restore point", vm, store.ErrNotFound)
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
	return points, bad, nil
}

// namesOf finds the points that refs name: all of a VM for its name, all that there are for none. It reads no
// document.
func namesOf(ctx context.Context, repo *store.Repo, refs []string) (names []store.PointName, err error) {
	if len(refs) == 0 {
		if refs, err = repo.VMs(ctx); err != nil {
			return nil, err
		}
	}
	for _, ref := range refs {
		if strings.Contains(ref, "@") {
			n, err := repo.FindName(ctx, ref)
			if err != nil {
				return nil, err
			}
			names = append(names, n)
			continue
		}
		of, err := repo.Points(ctx, ref)
		if err != nil {
			return nil, err
		}
		if len(of) == 0 {
			return nil, fmt.Errorf("%s: %w: it has no restore point", ref, store.ErrNotFound)
		}
		names = append(names, of...)
	}
	return names, nil
}
