package measure

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
)

// Sample is the values of one quantity, one per round, in the order of the rounds.
type Sample []float64

// Median is the middle value, or the mean of the two in the middle; NaN if there
// is none.
func (s Sample) Median() float64 { return quantile(s, 0.5) }

// Min and Max are NaN if there are no values.
func (s Sample) Min() float64 { return quantile(s, 0) }

// Max is the largest value.
func (s Sample) Max() float64 { return quantile(s, 1) }

// quantile interpolates between the two values next to it.
func quantile(s []float64, q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	return sorted(slices.Sorted(slices.Values(s)), q)
}

// sorted is quantile of values that are in order; there must be some.
func sorted(s []float64, q float64) float64 {
	at := q * float64(len(s)-1)
	low := int(at)
	if low == len(s)-1 {
		return s[low]
	}
	return s[low] + (at-float64(low))*(s[low+1]-s[low])
}

// Interval is a value and where it lies in 95 of 100 cases.
type Interval struct {
	Value float64 `json:"value"`
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
}

// String is how many times something is something else, and between what.
func (i Interval) String() string { return fmt.Sprintf("%.2f × [%.2f, %.2f]", i.Value, i.Low, i.High) }

const resamples = 10000

// Ratio is the median of the rounds' ratios a/b. A round's two values were
// measured next to each other, so what slows the whole machine down for longer
// than a round cancels out. Low and High are the 95 % percentile bootstrap interval:
// rounds are drawn with replacement, always the same ones for the same input. With
// fewer than seven rounds the interval is too narrow to be trusted. Rounds that only one
// side has, or where b is not positive, don't count; without any the result is NaN.
func Ratio(a, b Sample) Interval {
	var r []float64
	for i := range min(len(a), len(b)) {
		if v := a[i] / b[i]; b[i] > 0 && !math.IsNaN(v) {
			r = append(r, v)
		}
	}
	out := Interval{Value: Sample(r).Median(), Low: math.NaN(), High: math.NaN()}
	if len(r) == 0 {
		return out
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	medians, draw := make([]float64, resamples), make([]float64, len(r))
	for i := range medians {
		for j := range draw {
			draw[j] = r[rnd.IntN(len(r))]
		}
		slices.Sort(draw)
		medians[i] = sorted(draw, 0.5)
	}
	slices.Sort(medians)
	out.Low, out.High = sorted(medians, 0.025), sorted(medians, 0.975)
	return out
}
