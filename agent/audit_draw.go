package agent

import (
	"math/bits"
	"math/rand/v2"
)

// draw chooses granules by chance, each at most once: what was chosen up to any
// moment is a uniform sample of those that could be.
type draw struct {
	taken []uint64 // bit per granule: changed, or chosen already
	left  int64    // granules not taken
	n     uint64   // granules of the disk
	rand  *rand.Rand
	few   []int64 // those left in random order, when most are taken
	next  int64   // of run
}

// newDraw chooses from n granules but for those whose bit is set in taken, which then is its own.
func newDraw(taken []uint64, n int64, r *rand.Rand) *draw {
	d := &draw{taken: append([]uint64(nil), taken...), n: uint64(n), rand: r}
	for _, w := range taken {
		d.left += int64(bits.OnesCount64(^w))
	}
	return d
}

// one returns a granule. The caller has checked that one is left.
func (d *draw) one() int64 {
	d.left--
	if d.few == nil && uint64(d.left) < d.n/64 {
		// Guessing would take long.
		d.few = make([]int64, 0, d.left+1)
		for i, w := range d.taken {
			for free := ^w; free != 0; free &= free - 1 {
				d.few = append(d.few, int64(i)*64+int64(bits.TrailingZeros64(free)))
			}
		}
		d.rand.Shuffle(len(d.few), func(i, j int) { d.few[i], d.few[j] = d.few[j], d.few[i] })
	}
	if d.few != nil {
		g := d.few[0]
		d.few = d.few[1:]
		return g
	}
	for {
		g := d.rand.Uint64N(d.n)
		if bit := uint64(1) << (g % 64); d.taken[g/64]&bit == 0 {
			d.taken[g/64] |= bit
			return int64(g)
		}
	}
}

// run returns the next granules in a row, ascending, but not more than most. It is not for use
// beside one. The caller has checked that one is left.
func (d *draw) run(most int64) (first, n int64) {
	free := func(g int64) bool { return g < int64(d.n) && d.taken[g/64]>>(g%64)&1 == 0 }
	for !free(d.next) {
		if d.next%64 == 0 && d.taken[d.next/64] == ^uint64(0) {
			d.next += 64
		} else {
			d.next++
		}
	}
	for first = d.next; n < most && free(d.next); n++ {
		d.next++
	}
	d.left -= n
	return first, n
}

// bound returns the smallest k for which n good ones of a uniform sample, drawn without
// putting back from total, have a chance of at most 5 % if k of total are bad: the
// hypergeometric chance C(total-k, n) / C(total, n). For small n it is about the rule
// of three, 3·total/n. It is total+1 if nothing was drawn, which says nothing.
func bound(total, n int64) int64 {
	lo, hi := int64(1), total-n+1 // with hi bad ones, n good ones don't exist
	for lo < hi {
		k := lo + (hi-lo)/2
		if chance(total, n, k) <= 0.05 {
			hi = k
		} else {
			lo = k + 1
		}
	}
	return lo
}

// chance is that of a sample of n without any of k bad ones of total.
func chance(total, n, k int64) float64 {
	p := 1.0
	few, many := min(n, k), max(n, k) // the formula is symmetric in them
	for i := int64(0); i < few && p > 1e-3; i++ {
		p *= float64(total-many-i) / float64(total-i)
	}
	return p
}
