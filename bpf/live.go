package bpf

import (
	"slices"
	"sync/atomic"
)

// Live is what can be said of the current epoch while it is open.
type Live struct {
	Bitmap []uint64 // a copy; bits only ever come in until the epoch is closed
	Taint  Taint
	Loss   Loss     // so far, as all below
	Missed []uint64 // per program and copy
	Least  []uint64 // per program, see Epoch.LeastMissed

	Sectors, Landed uint64 // submitted and completed, 512 bytes each
	Kernel          uint64 // counted by the kernel's own statistics
	Counting        bool   // Kernel is known
}

// Live looks at the current epoch without closing it. The bitmap is copied before
// taints and losses are read: they hold for all that it shows.
func (r *Registration) Live() (Live, error) {
	bits := slices.Clone(r.current.Bitmap())
	l, err := r.live()
	l.Bitmap = bits
	return l, err
}

// Untouched tells whether nothing was written in the current epoch so far: no mark, no taint, no
// loss. It waits for no grace period, so a write that is just being submitted or completed may not
// show. But a submission is marked before the driver gets it: what was read from the device before
// Untouched was called holds no write that was submitted in this epoch, if the answer is true. The
// bitmap is not in the [Live] returned.
func (r *Registration) Untouched() (bool, Live, error) {
	words := r.current.Bitmap()
	for i := range words {
		if atomic.LoadUint64(&words[i]) != 0 {
			return false, Live{}, nil
		}
	}
	l, err := r.live()
	return err == nil && l.Taint == 0 && l.Loss == 0, l, err
}

// live is all but the bitmap.
func (r *Registration) live() (l Live, err error) {
	l.Taint = Taint(atomic.LoadUint64(&r.current.mem.words[hdrTaint]))
	so, err := r.soFar(r.current)
	l.Loss, l.Missed, l.Least = so.loss, so.missed, leastMissed(so.missed, so.vouched)
	l.Sectors, l.Landed, l.Kernel, l.Counting = so.sectors, so.landed, so.kernel, so.counting
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
