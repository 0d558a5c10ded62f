package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// Agent backs VMs up on a schedule, several at once.
type Agent struct {
	Config Config
	Repo   *store.Repo
	Source func(ctx context.Context, path string) (cbt.Source, error)
	// Auditor is as Source, for audits.
	Auditor func(ctx context.Context, path string) (cbt.Auditor, error)
	Tool    string
	Log     *slog.Logger

	// Collectors are further sources of metrics.
	Collectors []prometheus.Collector

	// Ready, if set, is told the address that metrics are served at.
	Ready func(net.Addr)
}

// Run works until ctx ends, and returns when all that it started has ended. A backup
// that is under way is given up; the next run takes it up from the last point.
func (a *Agent) Run(ctx context.Context) error {
	m := newMetrics()
	for _, c := range a.Collectors {
		if err := m.registry.Register(c); err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	if a.Config.Listen != "" {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", a.Config.Listen)
		if err != nil {
			return fmt.Errorf("serve metrics: %w", err)
		}
		if a.Ready != nil {
			a.Ready(l.Addr())
		}
		srv := &http.Server{Handler: m.handler(), ReadHeaderTimeout: 10 * time.Second}
		g.Go(func() error {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve metrics: %w", err)
			}
			return nil
		})
		g.Go(func() error {
			<-ctx.Done()
			return srv.Close()
		})
	}
	common, err := a.share()
	if err != nil {
		return err
	}
	for _, vm := range a.Config.VMs {
		g.Go(func() error { return a.follow(ctx, vm, m, common) })
	}
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// common is what the backups of an agent share.
type common struct {
	turns    chan struct{} // one for each backup that runs
	pipeline *Pipeline
}

func (a *Agent) share() (common, error) {
	limits, err := parseLimits(a.Config.LimitRate, a.Config.LimitIOPS)
	if err != nil {
		return common{}, err
	}
	if a.Config.IONice != "" {
		p, err := ParseIOPriority(a.Config.IONice)
		if err != nil {
			return common{}, err
		}
		if err := p.Apply(); err != nil {
			return common{}, err
		}
	}
	n := a.Config.Parallel
	if n <= 0 {
		n = DefaultParallel
	}
	return common{make(chan struct{}, n), NewPipeline(limits)}, nil
}

func (a *Agent) follow(ctx context.Context, vm VMConfig, m *metrics, with common) error {
	q, err := ParseQuiesce(vm.Quiesce)
	if err != nil {
		return err
	}
	limits, err := parseLimits(vm.LimitRate, vm.LimitIOPS)
	if err != nil {
		return err
	}
	job := Job{
		VM: vm.Name, Disks: vm.Disks, Repo: a.Repo, Quiesce: q, Source: a.Source, PauseBudget: vm.PauseBudget, Tool: a.Tool,
		Limits: limits, Shared: with.pipeline,
	}
	log := a.Log.With("vm", vm.Name)
	m.failed.WithLabelValues(vm.Name).Add(0) // so that the series exists from the start
	audits, err := a.schedule(vm, m, log)
	if err != nil {
		return err
	}
	for {
		next := time.Now().Add(vm.Every)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case with.turns <- struct{}{}:
		}
		r, err := job.Run(ctx)
		<-with.turns
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case r.Point == nil:
			m.failed.WithLabelValues(vm.Name).Inc()
			log.Error("backup failed", "error", err)
			if a.Config.Retry > 0 && a.Config.Retry < vm.Every {
				next = time.Now().Add(a.Config.Retry)
			}
		default:
			if err != nil {
				log.Warn("the restore point stands, but", "error", err)
			}
			m.success(vm.Name, r)
			s := Sum(r.Point)
			log.Info("restore point", "id", r.Point.ID, "changed", s.Changed, "read", s.Read, "stored", s.Stored,
				"paused", r.Point.Quiesce.Paused, "consistency", r.Point.Consistency, "took", r.Took)
			for _, d := range r.Point.Disks {
				if d.Tracking.Mode == "compare" {
					log.Warn("the whole disk was compared", "disk", d.Source, "reasons", d.Tracking.Reasons)
				}
			}
			a.forget(ctx, vm, log)
		}
		if err := audits.run(ctx, next); err != nil {
			return err
		}
		if err := sleep(ctx, time.Until(next)); err != nil {
			return err
		}
	}
}
