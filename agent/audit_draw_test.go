package agent

import (
	"math"
	"math/rand/v2"
	"testing"
)

// Every granule that can be drawn is drawn about as often, and no other, also when only
// few are left to choose from.
func TestDrawIsUniform(t *testing.T) {
	const n, rounds = 300, 20000
	for name, step := range map[string]int{"most": 3, "few": 75} {
		t.Run(name, func(t *testing.T) {
			taken := make([]uint64, (n+63)/64)
			var able int
			for g := range len(taken) * 64 {
				if most := step == 3; g >= n || most == (g%step == 0) {
					taken[g/64] |= 1 << (g % 64)
				} else {
					able++
				}
			}
			r := rand.New(rand.NewPCG(1, 2))
			var hits [n]int
			draws := able/2 + 1
			for range rounds {
				d := newDraw(taken, n, r)
				if d.left != int64(able) {
					t.Fatalf("%d left, want %d", d.left, able)
				}
				seen := map[int64]bool{}
				for range draws {
					g := d.one()
					if seen[g] || taken[g/64]>>(g%64)&1 != 0 {
						t.Fatalf("granule %d must not be drawn", g)
					}
					seen[g] = true
					hits[g]++
				}
			}
			p := float64(draws) / float64(able)
			want, sigma := rounds*p, math.Sqrt(rounds*p*(1-p))
			for g, h := range hits {
				if taken[g/64]>>(g%64)&1 == 0 && math.Abs(float64(h)-want) > 5*sigma {
					t.Errorf("granule %d was drawn %d times, want about %.0f", g, h, want)
				}
			}
		})
	}
}

func TestDrawRunsCoverAll(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		n := 1 + r.Int64N(400)
		taken := make([]uint64, (n+63)/64)
		for g := range int64(len(taken)) * 64 {
			if g >= n || r.Uint64()>>(seed%64) == 0 {
				taken[g/64] |= 1 << (g % 64)
			}
		}
		d := newDraw(taken, n, r)
		at := int64(0)
		for want := d.left; want > 0; want = d.left {
			first, k := d.run(16)
			if first < at || k < 1 || k > 16 || d.left != want-k {
				t.Fatalf("seed %d: run %d+%d after %d, %d left", seed, first, k, at, d.left)
			}
			for g := first; g < first+k; g++ {
				if taken[g/64]>>(g%64)&1 != 0 {
					t.Fatalf("seed %d: granule %d was taken", seed, g)
				}
			}
			at = first + k
		}
	}
}

// bound is checked against the formula itself, with logarithms of factorials.
func TestBound(t *testing.T) {
	lf := func(n int64) float64 { v, _ := math.Lgamma(float64(n) + 1); return v }
	exact := func(total, n, k int64) float64 {
		if k > total-n {
			return 0
		}
		return math.Exp(lf(total-k) - lf(total-k-n) - lf(total) + lf(total-n))
	}
	for total := int64(1); total < 2000; total = total*3/2 + 1 {
		for n := int64(1); n <= total; n = n*5/4 + 1 {
			k := bound(total, n)
			if exact(total, n, k) > 0.05+1e-9 || k > 1 && exact(total, n, k-1) <= 0.05-1e-9 {
				t.Errorf("bound(%d, %d) is %d: chances %g, %g", total, n, k, exact(total, n, k-1), exact(total, n, k))
			}
		}
	}
	for _, c := range [][3]int64{{5, 0, 6}, {0, 0, 1}, {384, 384, 1}, {384, 300, 2}, {16128, 256, 187}, {1 << 24, 256, 0}} {
		got := bound(c[0], c[1])
		if c[2] == 0 { // the rule of three
			if r := float64(got) / (3 * float64(c[0]) / float64(c[1])); r < 0.95 || r > 1.02 {
				t.Errorf("bound(%d, %d) is %d, %.3f of the rule of three", c[0], c[1], got, r)
			}
			continue
		}
		if got != c[2] {
			t.Errorf("bound(%d, %d) is %d, want %d", c[0], c[1], got, c[2])
		}
	}
}
