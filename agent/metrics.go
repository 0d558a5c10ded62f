package agent

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/tidemark/tidemark/store"
)

// metrics are what a fleet is watched by. Labels are VM names alone.
type metrics struct {
	registry *prometheus.Registry

	last, point                    *prometheus.GaugeVec
	took, paused                   *prometheus.HistogramVec
	changed, read, stored, unknown *prometheus.CounterVec
	failed                         *prometheus.CounterVec

	audited                   *prometheus.GaugeVec
	auditGranules, mismatches *prometheus.CounterVec
}

func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	vm := []string{"vm"}
	gauge := func(name, help string) *prometheus.GaugeVec {
		g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "tidemark", Name: name, Help: help}, vm)
		m.registry.MustRegister(g)
		return g
	}
	counter := func(name, help string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "tidemark", Name: name, Help: help}, vm)
		m.registry.MustRegister(c)
		return c
	}
	histogram := func(name, help string, start, factor float64) *prometheus.HistogramVec {
		h := prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "tidemark", Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(start, factor, 12),
		}, vm)
		m.registry.MustRegister(h)
		return h
	}
	m.last = gauge("last_success_timestamp_seconds", "When the last backup ended well.")
	m.point = gauge("last_point_timestamp_seconds", "The instant that the newest restore point shows: now minus this is the RPO.")
	m.took = histogram("backup_duration_seconds", "How long backups took.", 0.05, 3)
	m.paused = histogram("pause_seconds", "How long guests stood still for a backup.", 0.002, 2)
	m.changed = counter("changed_bytes_total", "Content that differed from the point before.")
	m.read = counter("read_bytes_total", "Read from the disks.")
	m.stored = counter("stored_bytes_total", "Written to the repository.")
	m.unknown = counter("compared_total", "Backups that had to compare a whole disk because tracking could not be proven complete.")
	m.failed = counter("backup_failures_total", "Backups that made no restore point.")
	m.audited = gauge("audit_last_timestamp_seconds", "When the last audit ended that could compare all disks with their last point, whatever it found.")
	m.auditGranules = counter("audit_granules_total", "Unchanged granules that audits found as they are in the last point.")
	m.mismatches = counter("audit_mismatches_total", "Granules that audits found to have changed without a record. More than 0 is an alarm.")
	return m
}

func (m *metrics) success(vm string, r Result) {
	m.last.WithLabelValues(vm).SetToCurrentTime()
	m.point.WithLabelValues(vm).Set(float64(r.Point.Time.UnixNano()) / 1e9)
	m.took.WithLabelValues(vm).Observe(r.Took.Seconds())
	m.paused.WithLabelValues(vm).Observe(r.Point.Quiesce.Paused.Seconds())
	s := Sum(r.Point)
	m.changed.WithLabelValues(vm).Add(float64(s.Changed))
	m.read.WithLabelValues(vm).Add(float64(s.Read))
	m.stored.WithLabelValues(vm).Add(float64(s.Stored))
	for _, d := range r.Point.Disks {
		if d.Tracking.Mode == "compare" {
			m.unknown.WithLabelValues(vm).Inc()
		}
	}
}

// audit counts what an audit found; ok if it could be made.
func (m *metrics) audit(vm string, r AuditResult) {
	for _, d := range r.Disks {
		m.auditGranules.WithLabelValues(vm).Add(float64(d.Good))
		m.mismatches.WithLabelValues(vm).Add(float64(d.Mismatched))
	}
	if r.compared() {
		m.audited.WithLabelValues(vm).SetToCurrentTime()
	}
}

// Sum adds up the costs of a point's disks.
func Sum(p *store.Point) store.Stats {
	var s store.Stats
	for _, d := range p.Disks {
		s.Changed += d.Stats.Changed
		s.Read += d.Stats.Read
		s.New += d.Stats.New
		s.Stored += d.Stats.Stored
	}
	return s
}

func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		// What can be had is served; promhttp_metric_handler_errors_total says that something is missing.
		ErrorHandling: promhttp.ContinueOnError, Registry: m.registry,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	return mux
}
