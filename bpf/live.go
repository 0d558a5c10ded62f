package bpf

import (
	"slices"
	"sync/atomic"
)

// Live is what can be said of the current epoch while it is open.
type Live struct {
	Bitmap []uint64 // a copy; bits only ever come in until the epoch is closed
	Taint  Taint
	Loss   Loss   // so far
	Missed Misses // so far, per program and copy
}

// Live looks at the current epoch without closing it. The bitmap is copied before
// taints and losses are read: they hold for all that it shows.
func (r *Registration) Live() (Live, error) {
	l := Live{Bitmap: slices.Clone(r.current.Bitmap())}
	l.Taint = Taint(atomic.LoadUint64(&r.current.mem.words[hdrTaint]))
	var err error
	l.Loss, l.Missed, err = r.losses(r.current)
	return l, err
}

// Marked tells whether one of the granules [first, last] is marked in the current
// epoch. Unlike other methods it may be called concurrently, but not
// beside Swap or Close.
func (r *Registration) Marked(first, last uint64) bool {
	words := r.current.Bitmap()
	for g := first; g <= last; g++ {
		if g/64 >= uint64(len(words)) || atomic.LoadUint64(&words[g/64])>>(g%64)&1 != 0 {
			return true
		}
	}
	return false
}

// Taint makes the current epoch unknown, also for other processes and later ones:
// the epoch's header is shared memory, and the programs set bits in it too.
func (r *Registration) Taint(why Taint) {
	atomic.OrUint64(&r.current.mem.words[hdrTaint], uint64(why))
}
