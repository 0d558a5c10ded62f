package store

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func at(s string) PointName {
	t, err := time.Parse("2006-01-02T15:04Z", s)
	if err != nil {
		panic(err)
	}
	return PointName{VM: "a", ID: fmt.Sprintf("%016x", t.Unix()), Time: t}
}

// kept applies a policy and returns the times that are kept, oldest first, with reasons.
func kept(points []candidatePoint, p Policy, loc *time.Location) []string {
	var out []string
	for _, d := range slices.Backward(decide(points, p, loc)) {
		if d.Keep {
			out = append(out, d.Time.Format("2006-01-02T15:04Z")+" "+strings.Join(d.Reasons, ","))
		}
	}
	return out
}

func every(from string, step time.Duration, n int) (out []candidatePoint) {
	first := at(from).Time
	for i := range n {
		out = append(out, candidatePoint{name: at(first.Add(time.Duration(i) * step).Format("2006-01-02T15:04Z"))})
	}
	return out
}

func TestPolicyKeepsTheNewestOfEachPeriod(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Skip("SKIP: no time zones here: ", err)
	}
	for name, c := range map[string]struct {
		points []candidatePoint
		p      Policy
		loc    *time.Location
		want   []string
	}{
		"last": {every("2026-03-01T00:00Z", time.Minute, 5), Policy{Last: 2}, time.UTC,
			[]string{"2026-03-01T00:03Z last 2", "2026-03-01T00:04Z last 1"}},
		"more than there are": {every("2026-03-01T00:00Z", time.Hour, 2), Policy{Daily: 9, Last: 1}, time.UTC,
			[]string{"2026-03-01T01:00Z last 1,daily 2026-03-01"}},
		"hours": {every("2026-03-01T00:00Z", 25*time.Minute, 8), Policy{Hourly: 2}, time.UTC,
			[]string{"2026-03-01T01:40Z hourly 2026-03-01 01h +0000", "2026-03-01T02:55Z hourly 2026-03-01 02h +0000"}},
		"periods without points do not count": {slices.Concat(every("2026-01-01T00:00Z", time.Hour, 2), every("2026-06-01T00:00Z", time.Hour, 2)), Policy{Daily: 2}, time.UTC,
			[]string{"2026-01-01T01:00Z daily 2026-01-01", "2026-06-01T01:00Z daily 2026-06-01"}},
		"weeks begin on Monday, also over a year's end": {every("2026-12-26T12:00Z", 24*time.Hour, 10), Policy{Weekly: 3}, time.UTC,
			[]string{"2026-12-27T12:00Z weekly 2026-W52", "2027-01-03T12:00Z weekly 2026-W53", "2027-01-04T12:00Z weekly 2027-W01"}},
		"months and years": {every("2025-11-30T00:00Z", 31*24*time.Hour, 4), Policy{Monthly: 2, Yearly: 2}, time.UTC,
			[]string{"2025-12-31T00:00Z yearly 2025", "2026-01-31T00:00Z monthly 2026-01", "2026-03-03T00:00Z monthly 2026-03,yearly 2026"}},
		"days are those of the zone": {every("2026-03-01T22:30Z", time.Hour, 2), Policy{Daily: 5}, berlin,
			[]string{"2026-03-01T22:30Z daily 2026-03-01", "2026-03-01T23:30Z daily 2026-03-02"}},
		"an hour that is shown twice is two": {every("2026-10-25T00:30Z", time.Hour, 2), Policy{Hourly: 5}, berlin,
			[]string{"2026-10-25T00:30Z hourly 2026-10-25 02h +0200", "2026-10-25T01:30Z hourly 2026-10-25 02h +0100"}},
		"pinned and unreadable ones stay, beside the rules": {[]candidatePoint{
			{name: at("2026-01-01T00:00Z"), pinned: "pinned: x"}, {name: at("2026-01-02T00:00Z")},
			{name: at("2026-01-03T00:00Z"), never: "can't be read"}, {name: at("2026-01-04T00:00Z")},
			{name: at("2026-01-05T00:00Z"), never: "can't be read"},
		}, Policy{Last: 1}, time.UTC,
			[]string{"2026-01-01T00:00Z pinned: x", "2026-01-03T00:00Z can't be read", "2026-01-04T00:00Z last 1", "2026-01-05T00:00Z can't be read"}},
		"a lesser point never takes the place of a good one": {[]candidatePoint{
			{name: at("2026-01-01T00:00Z"), lesser: true}, {name: at("2026-01-01T01:00Z")}, {name: at("2026-01-01T02:00Z"), lesser: true},
			{name: at("2026-01-01T03:00Z")}, {name: at("2026-01-01T04:00Z"), lesser: true},
		}, Policy{Last: 2, Daily: 1}, time.UTC,
			[]string{"2026-01-01T01:00Z last 2", "2026-01-01T03:00Z last 1,daily 2026-01-01", "2026-01-01T04:00Z newer than every good point"}},
		"only lesser points": {[]candidatePoint{{name: at("2026-01-01T00:00Z"), lesser: true}}, Policy{Last: 1}, time.UTC,
			[]string{"2026-01-01T00:00Z newer than every good point"}},
	} {
		if got := kept(c.points, c.p, c.loc); !slices.Equal(got, c.want) {
			t.Errorf("%s: kept\n  %s\nwant\n  %s", name, strings.Join(got, "\n  "), strings.Join(c.want, "\n  "))
		}
	}
}

func TestPolicyThatKeepsNothingIsRefused(t *testing.T) {
	r := testRepo(t)
	for _, p := range []Policy{{}, {Last: -1}, {Daily: 1, Weekly: -1}} {
		if _, err := r.Decide(t.Context(), "a", p, time.UTC); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", p, err)
		}
	}
}

func TestForgetKeepsPinned(t *testing.T) {
	r := testRepo(t)
	var points []PointName
	for i := range uint64(3) {
		points = append(points, backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(i, k64)}).Name())
	}
	if err := r.Pin(t.Context(), points[0], "first"); err != nil {
		t.Fatal(err)
	}
	if err := r.Pin(t.Context(), points[0], ""); !errors.Is(err, ErrExists) {
		t.Errorf("pinned twice: %v", err)
	}
	gone := points[2]
	gone.ID = "0123456789abcdef"
	if err := r.Pin(t.Context(), gone, ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("pin of no point: %v", err)
	}
	ds, err := r.Decide(t.Context(), "a", Policy{Last: 1}, time.UTC)
	if err != nil || len(ds) != 3 || !ds[0].Keep || ds[1].Keep || !slices.Equal(ds[2].Reasons, []string{"pinned: first"}) {
		t.Errorf("decisions %+v, %v", ds, err)
	}
	forgotten, err := r.Forget(t.Context(), append(points, gone), nil)
	if !errors.Is(err, ErrPinned) || len(forgotten) != 3 {
		t.Errorf("forgotten %v, %v", forgotten, err)
	}
	left, err := r.Points(t.Context(), "a")
	if err != nil || !slices.Equal(left, points[:1]) {
		t.Errorf("left %v, %v", left, err)
	}
	if err := r.Unpin(t.Context(), points[0]); err != nil {
		t.Fatal(err)
	}
	if err := r.Unpin(t.Context(), points[0]); !errors.Is(err, ErrNotFound) {
		t.Errorf("unpinned twice: %v", err)
	}
	if forgotten, err := r.Forget(t.Context(), points, nil); err != nil || len(forgotten) != 3 {
		t.Errorf("forgotten %v, %v", forgotten, err)
	}
}
