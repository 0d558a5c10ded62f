package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

func newAudit(g *globals) *cobra.Command {
	var o struct {
		disks          []string
		all            bool
		samples        int64
		fraction, rate string
		seed           uint64
		limit          time.Duration
		evidence       string
	}
	c := &cobra.Command{
		Use:   "audit NAME -r REPO",
		Short: "Check that the tracker has missed nothing",
		Long: `Check that the tracker has missed nothing: read granules of the disks of the VM called
NAME that are unchanged since its last point, as the tracker says, and compare them
with the point. What was missed since a backup last read the whole disk shows,
unless it was written again and recorded.

Granules are chosen by chance. How much that proves is printed: "fewer than 188 of
16,284 with 95 % confidence" for 256 good ones. That is the hypergeometric bound, about
3/256 of them all. --all reads every unchanged granule, and then the answer is exact. A
granule that is written meanwhile says nothing: it is void. The guest is not paused, and
no epoch is closed.

The audit reads at the lowest processor and disk priority (nice 19, I/O class idle, which the
I/O schedulers BFQ and mq-deadline know). Meanwhile a backup of the VM ends with status 4:
--for says how long that may be.

Exit status 6 is an alarm: a granule differs, also when read again, and no write to it was
recorded. Then the evidence is in --evidence, with the bytes that were found, and the next
backup compares the whole disk. 7 means that there is nothing to compare with: no
point, or no tracking that goes on from it. A backup makes both again.`,
		Example: `  tidemark audit web1 -r /srv/backup
  tidemark audit web1 -r /srv/backup --fraction 10% --rate 20MiB --for 10m
  tidemark audit web1 -r /srv/backup --all --json
  tidemark audit web1 -r /srv/backup --samples 5000 --seed 1234`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			audit := agent.Audit{
				VM: a[0], Disks: o.disks, All: o.all, Samples: o.samples, Seed: o.seed, Evidence: o.evidence, Tool: toolName(),
				Source: sources{pins: g.pins, state: cbt.State{Dir: g.state}}.adopt,
			}
			if err := store.ValidVM(a[0]); err != nil {
				return usageError{err}
			}
			if audit.Fraction, err = agent.ParseFraction(o.fraction); err != nil {
				return usageError{fmt.Errorf("audit: --fraction: %w", err)}
			}
			if o.rate != "" {
				if audit.Rate, err = agent.ParseRate(o.rate); err != nil {
					return usageError{fmt.Errorf("audit: --rate: %w", err)}
				}
			}
			if f := c.Flags(); f.Changed("samples") && f.Changed("fraction") || o.all && (f.Changed("samples") || f.Changed("fraction")) {
				return usageError{errors.New("audit: give one of --all, --samples and --fraction")}
			}
			if o.samples < 0 || o.limit < 0 {
				return usageError{errors.New("audit: --samples and --for must not be negative")}
			}
			if o.limit > 0 {
				audit.Until = time.Now().Add(o.limit)
			}
			if audit.Repo, err = g.open(c.Context()); err != nil {
				return err
			}
			defer func() { err = errors.Join(err, audit.Repo.Close()) }()
			bar := g.progress()
			audit.Progress = func(p agent.Progress) { bar.bytes(p.Phase, p.Done, p.Total) }
			r, err := audit.Run(c.Context())
			bar.end()
			if r.Point == "" {
				return err
			}
			switch {
			case g.json:
				err = errors.Join(err, printJSON(c.OutOrStdout(), r))
			case !g.quiet:
				err = errors.Join(err, auditSummary(c.OutOrStdout(), r))
			}
			return err
		},
	}
	f := c.Flags()
	f.StringArrayVar(&o.disks, "disk", nil, "block device of the VM, if not the one its last point names; repeat for all its disks, in the same order")
	f.BoolVar(&o.all, "all", false, "read every unchanged granule")
	f.Int64Var(&o.samples, "samples", 0, "read so many granules of each disk, chosen by chance")
	f.StringVar(&o.fraction, "fraction", "1%", "read this part of the unchanged granules of each disk, but at least 256, chosen by chance")
	f.StringVar(&o.rate, "rate", "", "read no more than so many bytes per second, as 20MiB")
	f.DurationVar(&o.limit, "for", 0, "end after this time with what is known by then (default: no limit)")
	f.Uint64Var(&o.seed, "seed", 0, "choose as an earlier audit with this seed did (default: by chance)")
	f.StringVar(&o.evidence, "evidence", agent.DefaultEvidenceDir, "directory for the evidence of what was missed")
	return c
}

// auditSummary prints a line for each disk, and below it what a person must not overlook.
func auditSummary(w io.Writer, r agent.AuditResult) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s@%s  audited in %s, seed %d\n", r.VM, r.Point, short(r.Took), r.Seed)
	for _, d := range r.Disks {
		n := humanize.Comma
		if d.Granules == 0 {
			fmt.Fprintf(&b, "  %s: not audited\n", d.Path)
			continue
		}
		fmt.Fprintf(&b, "  %s: %s: %s of %s granules unchanged, %s read (%s), %s void\n", d.Path, verdict(d),
			n(d.Unchanged), n(d.Granules), n(d.Sampled), size(d.Read), n(d.Void))
		if d.Early != "" {
			fmt.Fprintf(&b, "    ended early: %s\n", d.Early)
		}
		if d.Unsteady > 0 {
			fmt.Fprintf(&b, "    WARNING: %s granules differed once and did not when they were read again, without a write: is the disk all right?\n", n(d.Unsteady))
		}
		for _, m := range d.Mismatches {
			for _, x := range m.Grains {
				fmt.Fprintf(&b, "    bytes %d to %d: BLAKE3 %s, in the point %s\n", x.Off, x.Off+x.Len, x.Disk, x.Point)
			}
		}
		if rest := d.Mismatched - int64(len(d.Mismatches)); rest > 0 {
			fmt.Fprintf(&b, "    and %s granules more\n", n(rest))
		}
		if d.Mismatched > 0 {
			if d.Evidence != "" {
				fmt.Fprintf(&b, "    evidence: %s\n", d.Evidence)
			}
			if d.Trusted != "" {
				fmt.Fprintf(&b, "    points made after %s@%s, the last that read the whole disk, may hold old content there\n", r.VM, d.Trusted)
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func verdict(d agent.AuditedDisk) string {
	n := humanize.Comma
	switch {
	case d.Mismatched > 0:
		return fmt.Sprintf("ALARM: %s granules CHANGED WITHOUT A RECORD", n(d.Mismatched))
	case d.Problem != "":
		return "not audited to the end"
	case d.Exact:
		return "no unchanged granule differs"
	case d.Good == 0:
		return "nothing could be compared"
	case d.Bound == 0:
		return "no difference found"
	}
	return fmt.Sprintf("no difference found; with 95 %% confidence fewer than %s of %s unchanged granules differ", n(d.Bound), n(d.Unchanged))
}
