package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/store"
)

func newBackup(g *globals) *cobra.Command {
	var o struct {
		disks        []string
		quiesce      string
		budget       time.Duration
		granule      string
		inconsistent bool
		trust        bool
		rate         string
		iops         int64
		ionice       string
	}
	c := &cobra.Command{
		Use:   "backup NAME --disk DEV|FILE [--disk ...] -r REPO",
		Short: "Make a restore point of a VM",
		Long: `Make a restore point of the VM called NAME: all of its disks at one instant.

The first point reads the whole disk; later ones read what the tracker saw
changing. If tracking can't be proven complete, the whole disk is compared with the
last point and only differences are stored; the summary and the point say why.

The instant is found by reading while the guest runs, round after round, and
pausing it for the last one, for no longer than the pause budget. Nobody is paused if
nothing was written meanwhile. --quiesce says how to pause:

  auto        find out who uses the disk (QEMU's monitor, a mount on this host)
  qmp=SOCKET  QEMU's stop and cont
  freeze=DIR  freeze the file system mounted at DIR on this host
  pid=PID     stop the process
  none        don't; succeeds only if the disk is quiet by itself

A long backup notes every minute how far it has come. If it is interrupted, the next one of
the same VM goes on from there, for up to seven days: it reads what was not read yet and what
changed since. If what changed can't be proven, it reads everything and stores what is missing.

--limit-rate and --limit-iops bound what is read of the disks while the guest runs.`,
		Example: `  tidemark backup web1 --disk /dev/vg0/web1 -r /srv/backup
  tidemark backup web1 --disk /dev/vg0/web1 -r /srv/backup --limit-rate 50MiB --ionice idle
  tidemark backup web1 --disk /dev/loop0 --quiesce qmp=/run/web1.qmp --pause-budget 50ms -r /srv/backup`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			if len(o.disks) == 0 {
				return usageError{errors.New("backup: give at least one --disk")}
			}
			if o.budget <= 0 {
				return usageError{errors.New("backup: --pause-budget must be positive")}
			}
			if err := store.ValidVM(a[0]); err != nil {
				return usageError{err}
			}
			q, err := agent.ParseQuiesce(o.quiesce)
			if err != nil {
				return err
			}
			limits := agent.Limits{IOPS: o.iops}
			if o.rate != "" {
				if limits.BytesPerSecond, err = agent.ParseRate(o.rate); err != nil {
					return usageError{fmt.Errorf("backup: --limit-rate: %w", err)}
				}
			}
			if o.iops < 0 {
				return usageError{errors.New("backup: --limit-iops must not be negative")}
			}
			if o.ionice != "" {
				p, err := agent.ParseIOPriority(o.ionice)
				if err != nil {
					return usageError{fmt.Errorf("backup: --ionice: %w", err)}
				}
				if err := p.Apply(); err != nil {
					return err
				}
			}
			repo, err := g.open(c.Context())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			src, err := g.sources(o.granule)
			if err != nil {
				return err
			}
			src.state.Trust = o.trust
			p := g.progress()
			job := agent.Job{
				VM: a[0], Disks: o.disks, Repo: repo, Quiesce: q, Source: src.open, PauseBudget: o.budget,
				AllowInconsistent: o.inconsistent, Tool: toolName(), Progress: p.backup,
				Limits: limits,
			}
			r, err := job.Run(c.Context())
			p.end()
			if r.Point == nil {
				return err
			}
			switch {
			case g.json:
				err = errors.Join(err, printJSON(c.OutOrStdout(), r))
			case !g.quiet:
				err = errors.Join(err, summary(c.OutOrStdout(), r))
			}
			return err
		},
	}
	trustFlag(c, &o.trust)
	f := c.Flags()
	f.StringArrayVar(&o.disks, "disk", nil, "block device or raw image file of the VM; repeat for more, always in the same order")
	f.StringVar(&o.quiesce, "quiesce", "auto", "how to pause: auto, qmp=SOCKET, freeze=DIR, pid=PID or none")
	f.DurationVar(&o.budget, "pause-budget", agent.DefaultPauseBudget, "how long the guest may stand still")
	f.StringVar(&o.granule, "granule", "64KiB", "tracking granule of a device that is not tracked yet")
	f.StringVar(&o.rate, "limit-rate", "", "read no more than so many bytes per second, as 50MiB")
	f.Int64Var(&o.iops, "limit-iops", 0, "do no more than so many reads per second, each of at most 1 MiB; 0 for no limit")
	f.StringVar(&o.ionice, "ionice", "", "I/O priority: idle, best-effort, or best-effort:0 to best-effort:7")
	f.BoolVar(&o.inconsistent, "allow-inconsistent", false, "accept a point that shows no single instant, and mark it so")
	return c
}

// whole says what was done instead of an incremental, by the disk's mode.
var whole = map[string]string{
	"full":    "read whole",
	"compare": "compared with the last point",
	"tracked": "note",
}

// summary prints what a backup did, in a line, and below it all that a person
// must not overlook.
func summary(w io.Writer, r agent.Result) error {
	p, s := r.Point, agent.Sum(r.Point)
	var b strings.Builder
	fmt.Fprintf(&b, "%s@%s  %s  changed %s, read %s, stored %s, paused %s  (%s; %d rounds, %s, took %s)\n", p.VM, p.ID, modes(p),
		size(s.Changed), size(s.Read), size(s.Stored), short(p.Quiesce.Paused), p.Consistency, p.Quiesce.Rounds, p.Quiesce.Method, short(r.Took))
	for _, d := range p.Disks {
		if at := d.Tracking.Resumed; !at.IsZero() {
			fmt.Fprintf(&b, "  %s: went on from where an interrupted backup was at %s\n", d.Source, clock(at))
		}
		for _, why := range d.Tracking.Reasons {
			fmt.Fprintf(&b, "  %s: %s, because: %s\n", d.Source, whole[d.Tracking.Mode], why)
		}
	}
	for _, d := range p.Disks {
		if d.Tracking.Mode != "tracked" {
			continue
		}
		if e, err := parseEvidence(d.Tracking.Evidence); err == nil {
			if saved := sumEvidence(e).SavedState; saved != "" {
				fmt.Fprintf(&b, "  %s: tracking went on from the saved state %s\n", d.Source, saved)
			}
		}
	}
	if others := agent.Others(p); len(others) > 0 {
		fmt.Fprintf(&b, "  written by others than the VM: %s\n", writerList(others, 4))
	}
	if p.Consistency == store.None {
		fmt.Fprintf(&b, "  WARNING: the point shows no single instant (%s)\n", r.Chosen)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// modes is how the point's disks were read: "full", "tracked", "compare".
func modes(p *store.Point) string {
	var out []string
	for _, d := range p.Disks {
		if len(out) == 0 || out[len(out)-1] != d.Tracking.Mode {
			out = append(out, d.Tracking.Mode)
		}
	}
	return strings.Join(out, "+")
}
