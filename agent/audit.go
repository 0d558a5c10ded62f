package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// Defaults of an Audit.
const (
	DefaultEvidenceDir   = "/var/lib/tidemark/audit"
	DefaultAuditFraction = 0.01
	MinAuditSamples      = 256 // granules, where a fraction would be fewer
)

var (
	// ErrUnrecorded is wrapped when a disk holds other content than its last point
	// where no write was recorded.
	ErrUnrecorded = errors.New("a change that was not recorded")

	// ErrNotAuditable is wrapped, as is cbt.ErrUnproven, when there is nothing that a
	// disk could be compared with. It says nothing about the tracker.
	ErrNotAuditable = errors.New("there is nothing that an audit could compare it with")
)

// Audit reads granules that did not change since a VM's last point, according to the
// tracker, and compares them with the point. It closes no epoch and pauses nobody.
type Audit struct {
	VM   string
	Repo *store.Repo

	// Disks replaces the paths that the last point names: all of them, in its order.
	Disks []string

	// Source takes hold of the tracking of a disk. The audit closes it.
	Source func(ctx context.Context, path string) (cbt.Auditor, error)

	All      bool    // every unchanged granule
	Samples  int64   // so many of each disk; if 0: Fraction
	Fraction float64 // of the unchanged granules of each disk, but at least MinAuditSamples; DefaultAuditFraction if 0
	Rate     int64   // bytes per second that are read at most; no limit if 0

	// Seed makes the choice of granules repeatable, as long as the same ones
	// are unchanged; a random one if 0.
	Seed uint64

	// Until ends the reading early, with what is known by then; never if zero.
	Until time.Time

	// Evidence is the directory for what is found; DefaultEvidenceDir if empty.
	Evidence string

	// Tool is the name and version written into the evidence.
	Tool string

	// Progress, if set, is called about ten times a second, not concurrently.
	Progress func(Progress)

	settle time.Duration // before a granule that differs is read again; confirmAfter if 0
}

// confirmAfter is how long after the first reading a granule that differs is read
// again. A write that was in flight since before the last point may land before
// it is marked as complete: this has to be longer than a completion takes.
const confirmAfter = time.Second

// AuditResult is what an audit found.
type AuditResult struct {
	VM        string        `json:"vm"`
	Point     string        `json:"point"` // ID of the last point
	PointTime time.Time     `json:"point_time"`
	Begun     time.Time     `json:"begun"`
	Took      time.Duration `json:"took_ns"`
	Seed      uint64        `json:"seed"`
	Disks     []AuditedDisk `json:"disks"`
}

// AuditedDisk is one disk of an AuditResult. A granule is here what the next backup would
// read for a single mark: Granule bytes, the larger of the tracker's granule and the repository's grain.
type AuditedDisk struct {
	Name       string `json:"name"`
	Path       string `json:"path"`
	Granule    int64  `json:"granule"`            // bytes
	Granules   int64  `json:"granules"`           // of the disk
	Unchanged  int64  `json:"unchanged_granules"` // since the last point, up to the end of the audit
	Sampled    int64  `json:"sampled_granules"`
	Good       int64  `json:"good_granules"`         // as in the point, and unchanged to the end
	Void       int64  `json:"void_granules"`         // changed meanwhile: they say nothing
	Mismatched int64  `json:"mismatched_granules"`   // different, and not marked
	Unsteady   int64  `json:"unsteady_granules"`     // different at first, as in the point when read again, and not marked
	Read       int64  `json:"read_bytes"`            // from the disk
	Early      string `json:"ended_early,omitempty"` // why, if it is
	// Bound: with a confidence of 95 %, fewer of the unchanged granules than
	// this differ from the point. Nothing is said if it is 0.
	Bound      int64      `json:"bound_granules"`
	Exact      bool       `json:"exact"`                // all unchanged granules were compared, and none differs: for sure
	Mismatches []Mismatch `json:"mismatches,omitempty"` // the first 16
	// Evidence is the directory that was written.
	Evidence string `json:"evidence,omitempty"`
	// Trusted is the newest point that was made by reading the whole disk: those
	// made after it may hold old content where a change was not recorded.
	Trusted string `json:"trusted_point,omitempty"`
	// Problem says why the disk could not be audited to the end.
	Problem string `json:"problem,omitempty"`
}

// Mismatch is one granule that holds something else than the point.
type Mismatch struct {
	Off    int64           `json:"off"` // bytes
	Len    int64           `json:"len"` // bytes, cut to the disk
	Found  time.Time       `json:"found"`
	Grains []GrainMismatch `json:"grains"`
	data   []byte
}

// compared tells whether something can be said of every disk.
func (r AuditResult) compared() bool {
	for _, d := range r.Disks {
		if d.Problem != "" && d.Mismatched == 0 || d.Good == 0 && d.Mismatched == 0 && d.Unchanged > 0 {
			return false
		}
	}
	return len(r.Disks) > 0
}

// GrainMismatch is the part of a Mismatch that one grain of the repository stands for.
type GrainMismatch struct {
	Off   int64      `json:"off"`
	Len   int64      `json:"len"`
	Point store.Hash `json:"point_blake3"` // of the grain, filled up with zeroes; keyed if the repository is encrypted
	Disk  store.Hash `json:"disk_blake3"`
}

// Run audits the disks of the last point one after the other. The error wraps ErrUnrecorded
// if a mismatch was found on any: then what the tracker says of that disk is unknown until
// its next backup, and the evidence is on disk. It wraps ErrNotAuditable or cbt.ErrUnproven
// for disks that could not be audited. The result holds what is known in any case.
func (a Audit) Run(ctx context.Context) (AuditResult, error) {
	begin := time.Now()
	if a.Evidence == "" {
		a.Evidence = DefaultEvidenceDir
	}
	if a.Fraction == 0 {
		a.Fraction = DefaultAuditFraction
	}
	if a.Seed == 0 {
		a.Seed = 1 + rand.Uint64N(1<<32) // short enough to be typed
	}
	if a.settle == 0 {
		a.settle = confirmAfter
	}
	r := AuditResult{VM: a.VM, Begun: begin.UTC(), Seed: a.Seed}
	p, err := a.lastPoint(ctx)
	if err != nil {
		return r, err
	}
	r.Point, r.PointTime = p.ID, p.Time
	if a.Disks != nil && len(a.Disks) != len(p.Disks) {
		return r, fmt.Errorf("%s: %w: %d disks were given, its last point has %d", a.VM, ErrNotAuditable, len(a.Disks), len(p.Disks))
	}
	var errs []error
	for i := range p.Disks {
		d := diskAudit{Audit: &a, point: p, disk: &p.Disks[i], meter: meter{report: a.Progress}}
		d.out.Name, d.out.Path = d.disk.Name, d.disk.Source
		if a.Disks != nil {
			d.out.Path = a.Disks[i]
		}
		d.rand = rand.New(rand.NewPCG(a.Seed, uint64(i)))
		if !a.Until.IsZero() {
			// Each disk has its part of the time: else the last ones were never audited.
			d.until = time.Now().Add(time.Until(a.Until) / time.Duration(len(p.Disks)-i))
		}
		if err := d.run(ctx); err != nil {
			d.out.Problem = err.Error()
			errs = append(errs, err)
		}
		r.Disks = append(r.Disks, d.out)
		if ctx.Err() != nil {
			break
		}
	}
	r.Took = time.Since(begin)
	return r, errors.Join(errs...)
}

// lastPoint is the newest point. Unlike a backup, an audit does not pass over one that is
// damaged: the tracker has given up what lies before it.
func (a Audit) lastPoint(ctx context.Context) (*store.Point, error) {
	names, err := a.Repo.Points(ctx, a.VM)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s: %w: it has no restore point in %s", a.VM, ErrNotAuditable, a.Repo.Location())
	}
	return a.Repo.Point(ctx, names[len(names)-1])
}

// trusted is the newest point whose disk was read whole.
func (a Audit) trusted(ctx context.Context, disk string) (string, error) {
	names, err := a.Repo.Points(ctx, a.VM)
	if err != nil {
		return "", err
	}
	for i := len(names) - 1; i >= 0; i-- {
		p, err := a.Repo.Point(ctx, names[i])
		if err != nil {
			return "", err
		}
		if d := previous(p, disk); d != nil && d.Tracking.Mode != "tracked" {
			return p.ID, nil
		}
	}
	return "", nil
}
