package agent

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// leastAudit is how long an audit may delay the VM's next backup, so that one whose
// backups follow each other without a gap is audited too.
const leastAudit = 30 * time.Second

// audits runs the audits of one VM in between its backups. Backups of other VMs may run
// beside it: it gives way to them by its priority.
type audits struct {
	audit Audit
	every time.Duration // none if 0
	due   time.Time
	m     *metrics
	log   *slog.Logger
}

func (a *Agent) schedule(vm VMConfig, m *metrics, log *slog.Logger) (*audits, error) {
	if vm.Audit == nil {
		return &audits{}, nil
	}
	audit, err := vm.Audit.audit()
	if err != nil {
		return nil, err
	}
	audit.VM, audit.Repo, audit.Disks, audit.Source, audit.Tool = vm.Name, a.Repo, vm.Disks, a.Auditor, a.Tool
	m.auditGranules.WithLabelValues(vm.Name).Add(0)
	m.mismatches.WithLabelValues(vm.Name).Add(0)
	return &audits{audit: audit, every: vm.Audit.Every, m: m, log: log}, nil
}

// run audits if it is time for that. It ends before next, when the VM's backup is due, or soon
// after it began.
func (s *audits) run(ctx context.Context, next time.Time) error {
	now := time.Now()
	if s.every == 0 || now.Before(s.due) {
		return nil
	}
	a := s.audit
	a.Until = next
	if least := now.Add(leastAudit); least.After(next) {
		a.Until = least
	}
	r, err := a.Run(ctx)
	if r.compared() {
		s.due = now.Add(s.every) // else it is tried again after the next backup
	}
	if errors.Is(err, ErrUnrecorded) || ctx.Err() == nil {
		s.report(r, err)
	}
	return ctx.Err()
}

func (s *audits) report(r AuditResult, err error) {
	s.m.audit(s.audit.VM, r)
	for _, d := range r.Disks {
		log := s.log.With("disk", d.Path, "point", r.Point)
		switch {
		case d.Mismatched > 0:
			log.Error("an audit found a change that was not recorded: the next backup compares the whole disk",
				"mismatches", d.Mismatched, "evidence", d.Evidence, "trusted_point", d.Trusted, "problem", d.Problem)
		case d.Problem != "":
			log.Warn("the disk could not be audited", "problem", d.Problem)
		case d.Unsteady > 0:
			log.Warn("granules read differently twice, without a write", "granules", d.Unsteady)
		case d.Good == 0 && d.Unchanged > 0:
			log.Warn("the disk could not be audited", "problem", "no time was left for it")
		default:
			log.Info("audit", "unchanged", d.Unchanged, "sampled", d.Sampled, "void", d.Void, "fewer_than", d.Bound, "ended_early", d.Early, "seed", r.Seed)
		}
	}
	if len(r.Disks) == 0 {
		s.log.Warn("the VM could not be audited", "problem", err)
	}
}
