package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Decide tells which points of a VM a policy keeps, newest first. It reads their documents. Hours,
// days, ... are those of loc. Nothing is deleted. The error wraps
// ErrInvalid if the policy keeps nothing.
func (r *Repo) Decide(ctx context.Context, vm string, p Policy, loc *time.Location) ([]Decision, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	names, err := r.Points(ctx, vm)
	if err != nil {
		return nil, err
	}
	pins, err := r.Pins(ctx, vm)
	if err != nil {
		return nil, err
	}
	known, err := r.Damages(ctx, vm)
	if err != nil {
		return nil, err
	}
	var points []candidatePoint
	for _, n := range names {
		c := candidatePoint{name: n}
		_, c.damaged = known[n]
		if pin, ok := pins[n]; ok {
			c.pinned = "pinned"
			if pin.Note != "" {
				c.pinned += ": " + pin.Note
			}
		}
		doc, err := r.Point(ctx, n)
		switch {
		case errors.Is(err, ErrNotFound):
			continue
		case errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion):
			c.never = "can't be read: forget it by name"
		case err != nil:
			return nil, err
		default:
			c.lesser = doc.isLesser()
		}
		points = append(points, c)
	}
	return decide(points, p, loc), nil
}

// isLesser tells whether a point must not stand for others: it shows no single instant.
func (p *Point) isLesser() bool { return p.Consistency == None }

// Forget deletes points: their documents, which is all that makes them points. What
// they alone needed is garbage then, see [Repo.GC]. Nothing that others need is touched.
// Points that are pinned stay; the error then wraps ErrPinned, the others are
// forgotten all the same. One that is gone already is no error.
func (r *Repo) Forget(ctx context.Context, names []PointName, progress func(done, total int64)) (forgotten []PointName, err error) {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	// Oldest first: whatever interrupts this, the newest are still there.
	names = slices.Clone(names)
	slices.SortFunc(names, func(a, b PointName) int { return a.Time.Compare(b.Time) })
	var kept []error
	for i, n := range names {
		progress(int64(i), int64(len(names)))
		pinned, err := r.exists(ctx, r.pinObject(n))
		if err != nil {
			return forgotten, err
		}
		if pinned {
			kept = append(kept, fmt.Errorf("%s is %w", n, ErrPinned))
			continue
		}
		if err := r.removed(ctx, r.pointObject(n)); err != nil {
			return forgotten, fmt.Errorf("forget %s: %w", n, err)
		}
		if err := r.dropDamage(ctx, n, 0); err != nil {
			return forgotten, fmt.Errorf("forget what is known of the damage to %s: %w", n, err)
		}
		if err := r.dropChecks(ctx, n); err != nil {
			return forgotten, fmt.Errorf("forget the checks of %s: %w", n, err)
		}
		forgotten = append(forgotten, n)
	}
	return forgotten, errors.Join(kept...)
}
