package main

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/agent"
)

func newAgent(g *globals) *cobra.Command {
	var file, granule string
	c := &cobra.Command{
		Use:   "agent --config FILE",
		Short: "Back up on a schedule, and serve metrics",
		Long: `Back up on a schedule until it is stopped, and serve Prometheus metrics at /metrics.

The configuration is YAML:

  repository: /srv/backup
  listen: 127.0.0.1:9177      # metrics; leave it out for none
  retry: 30s                  # after a failure; else the VM's interval
  trust_saved_state: false    # as the flag of backup
  parallel: 16                # backups at once
  limit_rate: 200MiB          # read per second by all backups together; leave it out for no limit
  limit_iops: 500             # reads of at most 1 MiB per second
  ionice: idle                # or best-effort, best-effort:0 to best-effort:7
  vms:
    - name: web1
      disks: [/dev/vg0/web1]
      every: 5m
      quiesce: auto           # as for backup
      pause_budget: 100ms
      limit_rate: 50MiB       # of this VM, besides the common limit; limit_iops too
      audit:                  # as tidemark audit does; leave it out for none
        every: 24h
        fraction: 1%          # of the unchanged granules, but at least 256
        rate: 20MiB           # per second; leave it out for no limit
        evidence: /var/lib/tidemark/audit
      keep:                   # forget the others after each backup; leave it out to keep all
        last: 3
        hourly: 24
        daily: 7              # weekly, monthly, yearly

What is forgotten takes its space until "tidemark gc" runs. Pinned points stay.

Backups that run at once share the limits, and each gets about as much as any other, however
large it is. Limits don't hold up a guest that is paused.

An audit runs after a backup and ends when the VM's next one is due, but has 30 s at
least. What it finds is logged as an error, and counted in tidemark_audit_mismatches_total.`,
		Example: "  tidemark agent --config /etc/tidemark.yaml",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if file == "" {
				return usageError{errors.New("agent: give --config FILE")}
			}
			cfg, err := agent.LoadConfig(file)
			if err != nil {
				return err
			}
			repo, err := g.openAt(c.Context(), cfg.Repository)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			src, err := g.sources(granule)
			if err != nil {
				return err
			}
			src.state.Trust = cfg.TrustSavedState
			if err := src.check(); err != nil {
				return err
			}
			var out io.Writer = os.Stderr
			if g.quiet {
				out = io.Discard
			}
			log := slog.New(slog.NewTextHandler(out, nil))
			if g.json {
				log = slog.New(slog.NewJSONHandler(out, nil))
			}
			a := &agent.Agent{
				Config: cfg, Repo: repo, Source: src.open, Auditor: src.adopt, Tool: toolName(), Log: log,
				Collectors: []prometheus.Collector{trackerMetrics{g.pins}},
				Ready:      func(addr net.Addr) { log.Info("serving metrics", "address", addr.String()) },
			}
			return a.Run(c.Context())
		},
	}
	c.Flags().StringVar(&file, "config", "", "configuration file")
	c.Flags().StringVar(&granule, "granule", "64KiB", "tracking granule of devices that are not tracked yet")
	return c
}

// newWatchdog is run by backup itself, see package agent.
func newWatchdog() *cobra.Command {
	return &cobra.Command{
		Use: agent.WatchdogCommand, Hidden: true, Args: args(2, 2),
		RunE: func(_ *cobra.Command, a []string) error { return agent.RunWatchdog(a, os.Stdin, os.Stdout) },
	}
}
