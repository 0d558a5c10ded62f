package measure_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		s                measure.Sample
		low, median, top float64
	}{
		{measure.Sample{5}, 5, 5, 5},
		{measure.Sample{3, 1, 2}, 1, 2, 3},
		{measure.Sample{4, 1, 3, 2}, 1, 2.5, 4},
	} {
		before := append(measure.Sample(nil), c.s...)
		if c.s.Median() != c.median || c.s.Min() != c.low || c.s.Max() != c.top {
			t.Errorf("%v: got %v in [%v, %v]", c.s, c.s.Median(), c.s.Min(), c.s.Max())
		}
		for i := range before {
			if before[i] != c.s[i] {
				t.Fatalf("the order of the rounds was changed: %v", c.s)
			}
		}
	}
	if !math.IsNaN(measure.Sample(nil).Median()) {
		t.Error("a median of nothing")
	}
}

func TestRatioIsOfRoundsNotOfMedians(t *testing.T) {
	// The machine gets ten times slower on the way; within each round a is 0.9 b.
	b := measure.Sample{100, 80, 60, 40, 30, 20, 10}
	a := make(measure.Sample, len(b))
	for i := range b {
		a[i] = 0.9 * b[i]
	}
	r := measure.Ratio(a, b)
	if math.Abs(r.Value-0.9) > 1e-9 || math.Abs(r.Low-0.9) > 1e-9 || math.Abs(r.High-0.9) > 1e-9 {
		t.Fatalf("got %+v", r)
	}
}

func TestRatioNeedsPairs(t *testing.T) {
	if r := measure.Ratio(measure.Sample{1, 2}, nil); !math.IsNaN(r.Value) || !math.IsNaN(r.Low) {
		t.Fatalf("got %+v", r)
	}
	if r := measure.Ratio(measure.Sample{1, 8, 9}, measure.Sample{2, 0}); r.Value != 0.5 {
		t.Fatalf("got %+v", r)
	}
}

// The interval has to hold the true ratio about as often as it says.
func TestRatioIntervalCovers(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	const trials, rounds, truth = 100, 11, 0.97
	hits := 0
	for range trials {
		a, b := make(measure.Sample, rounds), make(measure.Sample, rounds)
		for i := range a {
			speed := 50 + 100*rnd.Float64() // the machine's, in this round
			b[i] = speed * math.Exp(0.02*rnd.NormFloat64())
			a[i] = speed * truth * math.Exp(0.02*rnd.NormFloat64())
		}
		if r := measure.Ratio(a, b); r.Low <= truth && truth <= r.High {
			hits++
		}
	}
	if share := float64(hits) / trials; share < 0.85 {
		t.Fatalf("the 95 %% interval holds the truth in %.1f %% of %d trials", 100*share, trials)
	}
}
