package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/tidemark/tidemark/store"
)

func newForget(g *globals) *cobra.Command {
	var policy store.Policy
	var all, dry bool
	c := &cobra.Command{
		Use:   "forget NAME... | --all | NAME@POINT... -r REPO",
		Short: "Delete restore points, by a policy or by name",
		Long: `Delete restore points: of the VMs named, those that no --keep rule keeps; or just the points
named. Other points need nothing of them. The space is given back by "tidemark gc".

A rule keeps the newest point of each of the last N hours, days, weeks (from Monday), months or
years that have a point, in local time. Pinned points are always kept. A point that
shows no single instant never stands for a period, and is kept only while no good
one is newer.`,
		Example: `  tidemark forget web1 --keep-last 3 --keep-hourly 24 --keep-daily 7 --keep-weekly 5 --dry-run -r /srv/backup
  tidemark forget --all --keep-daily 14 --keep-monthly 12 -r /srv/backup
  tidemark forget web1@3fb0c2d1 -r /srv/backup`,
		Args: args(0, -1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			if all == (len(a) > 0) {
				return usageError{errors.New("name VMs or points, or give --all")}
			}
			byName := len(a) > 0 && strings.Contains(a[0], "@")
			if byName == (policy != store.Policy{}) {
				return usageError{errors.New("points are forgotten by name (NAME@POINT), VMs by at least one --keep rule")}
			}
			repo, err := g.open(c.Context())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			var ds []store.Decision
			if byName {
				ds, err = named(c.Context(), repo, a)
			} else {
				ds, err = decided(c.Context(), repo, a, policy)
			}
			if err != nil {
				return err
			}
			return g.forget(c, repo, ds, dry)
		},
	}
	f := c.Flags()
	keepFlags(f, &policy)
	f.BoolVar(&all, "all", false, "all VMs")
	f.BoolVarP(&dry, "dry-run", "n", false, "show what would be kept and why, delete nothing")
	return c
}

func keepFlags(f *pflag.FlagSet, p *store.Policy) {
	f.IntVar(&p.Last, "keep-last", 0, "keep the newest `N` points")
	f.IntVar(&p.Hourly, "keep-hourly", 0, "keep the newest point of each of the last `N` hours that have one")
	f.IntVar(&p.Daily, "keep-daily", 0, "the same for days")
	f.IntVar(&p.Weekly, "keep-weekly", 0, "the same for weeks")
	f.IntVar(&p.Monthly, "keep-monthly", 0, "the same for months")
	f.IntVar(&p.Yearly, "keep-yearly", 0, "the same for years")
}

// named are points to forget that the user named.
func named(ctx context.Context, repo *store.Repo, refs []string) ([]store.Decision, error) {
	var ds []store.Decision
	for _, ref := range refs {
		if !strings.Contains(ref, "@") {
			return nil, usageError{fmt.Errorf("%s names no point: give NAME@POINT, or only VMs and --keep rules", ref)}
		}
		n, err := repo.FindName(ctx, ref) // it need not be readable
		if err != nil {
			return nil, err
		}
		pins, err := repo.Pins(ctx, n.VM)
		if err != nil {
			return nil, err
		}
		d := store.Decision{PointName: n}
		if _, pinned := pins[n]; pinned {
			return nil, fmt.Errorf("%s is %w", n, store.ErrPinned)
		}
		ds = append(ds, d)
	}
	return ds, nil
}

func decided(ctx context.Context, repo *store.Repo, vms []string, p store.Policy) ([]store.Decision, error) {
	if len(vms) == 0 {
		var err error
		if vms, err = repo.VMs(ctx); err != nil {
			return nil, err
		}
	}
	var out []store.Decision
	for _, vm := range vms {
		ds, err := repo.Decide(ctx, vm, p, time.Local)
		if err != nil {
			return nil, err
		}
		if len(ds) == 0 {
			return nil, fmt.Errorf("%s: %w: it has no restore point", vm, store.ErrNotFound)
		}
		out = append(out, ds...)
	}
	return out, nil
}

func (g *globals) forget(c *cobra.Command, repo *store.Repo, ds []store.Decision, dry bool) error {
	names := store.NotKept(ds)
	if !g.json && !g.quiet {
		if err := printDecisions(c, ds, dry); err != nil {
			return err
		}
	}
	var forgotten []store.PointName
	var err error
	if !dry {
		bar := g.progress()
		forgotten, err = repo.Forget(c.Context(), names, func(done, total int64) { bar.count("forgetting", done, total) })
		bar.end()
	}
	if g.json {
		return errors.Join(err, printJSON(c.OutOrStdout(), struct {
			DryRun    bool              `json:"dry_run"`
			Decisions []store.Decision  `json:"decisions"`
			Forgotten []store.PointName `json:"forgotten"`
		}{dry, ds, append([]store.PointName{}, forgotten...)}))
	}
	if !g.quiet {
		what := fmt.Sprintf("%d of %d points forgotten; `tidemark gc` gives the space back", len(forgotten), len(ds))
		if dry {
			what = fmt.Sprintf("%d of %d points would be forgotten", len(names), len(ds))
		}
		_, perr := fmt.Fprintln(c.OutOrStdout(), what)
		err = errors.Join(err, perr)
	}
	return err
}

func printDecisions(c *cobra.Command, ds []store.Decision, dry bool) error {
	t := newTable(c.OutOrStdout(), "POINT", "TIME", "", "WHY")
	for _, d := range ds {
		what := "forget"
		switch {
		case d.Keep:
			what = "keep"
		case dry:
			what = "would forget"
		}
		t.row(d.String(), clock(d.Time), what, strings.Join(d.Reasons, ", "))
	}
	return t.flush()
}

func newPin(g *globals) *cobra.Command {
	var note string
	c := &cobra.Command{
		Use:   "pin NAME@POINT -r REPO",
		Short: "Keep a restore point from being forgotten",
		Example: `  tidemark pin web1@latest --note "before the upgrade" -r /srv/backup
  tidemark unpin web1@3fb0c2d1 -r /srv/backup`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) error {
			return g.onPoint(c, a[0], "pinned", func(ctx context.Context, repo *store.Repo, n store.PointName) error { return repo.Pin(ctx, n, note) })
		},
	}
	c.Flags().StringVar(&note, "note", "", "why, for people")
	return c
}

func newUnpin(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "unpin NAME@POINT -r REPO",
		Short:   "Let a pinned restore point be forgotten",
		Example: "  tidemark unpin web1@3fb0c2d1 -r /srv/backup",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, a []string) error {
			return g.onPoint(c, a[0], "unpinned", func(ctx context.Context, repo *store.Repo, n store.PointName) error { return repo.Unpin(ctx, n) })
		},
	}
}

// onPoint does something with the point that ref names, and says so.
func (g *globals) onPoint(c *cobra.Command, ref, done string, do func(context.Context, *store.Repo, store.PointName) error) error {
	return g.withRepo(c, func(ctx context.Context, repo *store.Repo) error {
		n, err := repo.FindName(ctx, ref)
		if err != nil {
			return err
		}
		if err := do(ctx, repo, n); err != nil {
			return err
		}
		return g.say(c, n, "%s %s", n, done)
	})
}
