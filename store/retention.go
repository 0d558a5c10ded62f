package store

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Policy says which points of a VM to keep. Each rule keeps the newest point of each of the last so many
// hours, days, weeks (from Monday, ISO 8601), months or years that have a point. A point
// that any rule keeps is kept. The zero Policy keeps nothing and is refused.
type Policy struct {
	Last    int `json:"last,omitempty" yaml:"last"` // the newest ones, whatever their time
	Hourly  int `json:"hourly,omitempty" yaml:"hourly"`
	Daily   int `json:"daily,omitempty" yaml:"daily"`
	Weekly  int `json:"weekly,omitempty" yaml:"weekly"`
	Monthly int `json:"monthly,omitempty" yaml:"monthly"`
	Yearly  int `json:"yearly,omitempty" yaml:"yearly"`
}

// rule is one line of a policy.
type rule struct {
	name   string
	n      int
	period func(time.Time) string // the same for all instants of a period
}

func (p Policy) rules() []rule {
	layout := func(l string) func(time.Time) string { return func(t time.Time) string { return t.Format(l) } }
	return []rule{
		{"last", p.Last, layout(time.RFC3339Nano)},
		// With the zone: an hour that a clock shows twice is two.
		{"hourly", p.Hourly, layout("2006-01-02 15h -0700")},
		{"daily", p.Daily, layout("2006-01-02")},
		{"weekly", p.Weekly, func(t time.Time) string {
			y, w := t.ISOWeek()
			return fmt.Sprintf("%d-W%02d", y, w)
		}},
		{"monthly", p.Monthly, layout("2006-01")},
		{"yearly", p.Yearly, layout("2006")},
	}
}

// Validate tells whether p can be used: the error wraps ErrInvalid.
func (p Policy) Validate() error {
	sum := 0
	for _, r := range p.rules() {
		if r.n < 0 {
			return fmt.Errorf("%w: keep %s %d", ErrInvalid, r.name, r.n)
		}
		sum += min(r.n, 1)
	}
	if sum == 0 {
		return fmt.Errorf("%w: a policy that keeps nothing", ErrInvalid)
	}
	return nil
}

// Decision says whether a point is kept, and why.
type Decision struct {
	PointName
	Keep bool `json:"keep"`
	// Reasons why it is kept: "pinned", "last 1", "daily 2026-11-25", ...
	Reasons []string `json:"reasons,omitempty"`
}

// NotKept returns the points of ds that may be forgotten, in their order.
func NotKept(ds []Decision) (names []PointName) {
	for _, d := range ds {
		if !d.Keep {
			names = append(names, d.PointName)
		}
	}
	return names
}

// candidatePoint is a point as a policy sees it.
type candidatePoint struct {
	name   PointName
	pinned string // "pinned", with the note; empty if it is not
	never  string // why no policy may delete it; empty if one may
	lesser bool   // it never stands for a period: another point does, or none

	// damaged is known to have lost something, which may be healed yet: it is kept as if it had not, and so is the
	// point that stands for the period without it.
	damaged bool
}

// decide applies a policy to the points of one VM. Periods are those of loc. The result is in
// the order of points, newest first.
//
// A lesser point, which lacks data or shows no single instant, never takes the place of a good
// one: rules look at the good ones, and a lesser one is kept if it is newer than all
// that are good.
func decide(points []candidatePoint, p Policy, loc *time.Location) []Decision {
	points = slices.Clone(points)
	slices.SortFunc(points, func(a, b candidatePoint) int {
		return cmp.Or(b.name.Time.Compare(a.name.Time), cmp.Compare(b.name.ID, a.name.ID))
	})
	out := make([]Decision, len(points))
	good := false
	for i, c := range points {
		out[i].PointName = c.name
		if c.pinned != "" {
			out[i].Reasons = append(out[i].Reasons, c.pinned)
		}
		if c.never != "" {
			out[i].Reasons = append(out[i].Reasons, c.never)
		}
		good = good || !c.lesser
		if !good {
			out[i].Reasons = append(out[i].Reasons, "newer than every good point")
		}
	}
	for _, r := range p.rules() {
		r.keep(points, out, loc, func(candidatePoint) bool { return true })
		if slices.ContainsFunc(points, func(c candidatePoint) bool { return c.damaged }) {
			r.keep(points, out, loc, func(c candidatePoint) bool { return !c.damaged })
		}
	}
	for i := range out {
		out[i].Keep = len(out[i].Reasons) > 0
	}
	return out
}

// keep gives reasons to those of points that the rule keeps, if it looks at those alone that count.
func (r rule) keep(points []candidatePoint, out []Decision, loc *time.Location, counts func(candidatePoint) bool) {
	last := ""
	n := 0
	for i, c := range points {
		if n == r.n {
			return
		}
		if c.lesser || c.never != "" || !counts(c) {
			continue
		}
		period := r.period(c.name.Time.In(loc))
		if period == last && r.name != "last" {
			continue
		}
		last = period
		n++
		reason := r.name + " " + period
		if r.name == "last" {
			reason = fmt.Sprintf("last %d", n)
		}
		if !slices.Contains(out[i].Reasons, reason) {
			out[i].Reasons = append(out[i].Reasons, reason)
		}
	}
}
