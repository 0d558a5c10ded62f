package store

import (
	"context"
	"sync/atomic"

	"github.com/tidemark/tidemark/store/blob"
)

// Random reads meet the storage's latency once per grain. Where several grains of a window of a pack were
// read one by one, more of it will be wanted most likely, and all of it is asked for at once: that is at most
// preloadWindow for what preloadAfter reads took, and never a window twice.
const (
	preloadWindow = 1 << 20 // bytes, about 40 grains
	preloadAfter  = 3       // reads
)

// touches counts the reads of single grains per window of a pack. Safe for concurrent use.
type touches []atomic.Uint32

// newTouches is for a pack whose records end at end.
func newTouches(end int64) touches { return make(touches, (end+preloadWindow-1)/preloadWindow) }

// cost is their memory in bytes.
func (t touches) cost() int64 { return int64(len(t)) * 4 }

// add counts a read at off and returns where the window begins if it is to be loaded now.
func (t touches) add(off int64) (from int64, load bool) {
	w := off / preloadWindow
	if w >= int64(len(t)) {
		return 0, false
	}
	return w * preloadWindow, t[w].Add(1) == preloadAfter
}

// touched tells that the record of e was read by itself.
func (r *reader) touched(ctx context.Context, x *packIndex, e packEntry) {
	if from, load := x.touches.add(int64(e.off)); load {
		// Who reads there will see what is wrong.
		_ = blob.Preload(ctx, r.blobs, packObject(x.pack, x.generation), from, preloadWindow)
	}
}
