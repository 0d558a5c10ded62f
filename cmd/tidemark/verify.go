package main

import (
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/store"
)

func newVerify(g *globals) *cobra.Command {
	var quick, full bool
	var percent float64
	var seed uint64
	c := &cobra.Command{
		Use:   "verify [NAME[@POINT]] -r REPO",
		Short: "Prove that restore points are whole",
		Long: `Prove that restore points are whole: read every byte of them and check it against
its hash. What several points share is read once. --quick checks that all that is needed is there, without reading the data;
--sample also reads a part of the data, drawn by a seed that is printed and can be given again.`,
		Example: `  tidemark verify -r /srv/backup
  tidemark verify web1@latest --quick -r /srv/backup
  tidemark verify web1 --sample 5 -r /srv/backup
  tidemark verify web1 --sample 5 --seed 1764087412 -r /srv/backup`,
		Args: args(0, 1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			sampled, seeded := c.Flags().Changed("sample"), c.Flags().Changed("seed")
			switch {
			case quick && full || sampled && (quick || full) || seeded && !sampled:
				return usageError{errors.New("verify: give one of --quick, --full and --sample; --seed goes with --sample")}
			case sampled && !(percent > 0 && percent <= 100):
				return usageError{errors.New("verify: --sample is a percentage above 0")}
			case sampled && !seeded:
				seed = rand.Uint64()
			}
			repo, err := g.open(c.Context())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			if !quick {
				if err := repo.CanRead(); err != nil {
					return err
				}
			}
			points, err := namesOf(c.Context(), repo, a)
			if err != nil {
				return err
			}
			var v *store.Verification
			switch {
			case sampled:
				v, err = repo.NewQuickVerification(&store.Sample{Part: percent / 100, Seed: seed})
			case quick:
				v, err = repo.NewQuickVerification(nil)
			default:
				v, err = repo.NewVerification()
			}
			if err != nil {
				return err
			}
			reports := []store.VerifyReport{}
			problems := 0
			for _, p := range points {
				bar := g.progress()
				r, err := v.Point(c.Context(), p, func(done, total int64) { bar.bytes(p.VM+"@"+p.ID, done, total) })
				bar.end()
				if errors.Is(err, store.ErrNotFound) && len(points) > 1 {
					continue // forgotten since it was listed
				}
				if err != nil {
					return err
				}
				reports = append(reports, r)
				problems += len(r.Problems)
				if g.json {
					continue
				}
				state := "good"
				if len(r.Problems) > 0 {
					state = "DAMAGED"
				}
				shared := ""
				if r.Shared > 0 {
					shared = fmt.Sprintf(", %d shared with points before", r.Shared)
				}
				_, _ = fmt.Fprintf(c.OutOrStdout(), "%s@%s  %s  %d grains, %s read%s\n", p.VM, p.ID, state, r.Grains, size(r.Bytes), shared)
				for _, x := range r.Problems {
					if x.Disk == "" {
						_, _ = fmt.Fprintf(c.OutOrStdout(), "  %s: %s\n", x.Object, x.What)
						continue
					}
					_, _ = fmt.Fprintf(c.OutOrStdout(), "  %s: %s, bytes %d to %d: %s\n", x.Object, x.Disk, x.Off, x.Off+x.Len, x.What)
				}
			}
			if sampled && !g.json && !g.quiet {
				_, _ = fmt.Fprintf(c.OutOrStdout(), "sample: %v %%, --seed %d draws the same again\n", percent, seed)
			}
			if g.json {
				if err := printJSON(c.OutOrStdout(), reports); err != nil {
					return err
				}
			}
			if problems > 0 {
				if !g.json && !g.quiet {
					_, _ = fmt.Fprintln(c.OutOrStdout(), "`tidemark repair` heals what has a good copy, and has the next backup read the rest again")
				}
				return errProblems
			}
			return nil
		},
	}
	f := c.Flags()
	f.BoolVar(&quick, "quick", false, "check the structure, don't read the data")
	f.BoolVar(&full, "full", false, "read every byte: the default")
	f.Float64Var(&percent, "sample", 0, "check the structure and read so many `PERCENT` of the data")
	f.Uint64Var(&seed, "seed", 0, "draw the sample by this seed (default: a random one)")
	return c
}
