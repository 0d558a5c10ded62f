package restore

import (
	"context"
	"runtime"
	"sync"
)

const (
	aheadStreams = 8        // sequential readers of one disk that are told apart
	aheadBytes   = 16 << 20 // how far ahead of a reader to load, at most
	aheadSpan    = 2 << 20  // what a goroutine loads at once, in bytes
	aheadQueue   = 32       // spans waiting to be loaded
	aheadLoaders = 4        // goroutines per disk, at most
)

// readAhead watches the reads of a disk and loads the grains that will be wanted next:
// as much as a reader has read in sequence, so at most half of what is loaded is
// in vain. It starts goroutines only while there is something to load, and close
// waits for them.
type readAhead struct {
	grain  int64 // size in bytes
	grains int64 // of the disk
	window int64 // grains to be ahead, at most; 0: off
	load   func(ctx context.Context, from, to int64)

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	streams [aheadStreams]stream
	clock   int64
	queue   []grainSpan
	loaders int
}

// grainSpan is the grains [from, to).
type grainSpan struct{ from, to int64 }

// stream is one sequential reader.
type stream struct {
	start  int64 // where it began, in bytes
	next   int64 // where its next read should begin, in bytes; 0: unused
	queued int64 // grains before this one were queued
	used   int64 // clock of the last read
}

// newReadAhead prepares read-ahead through load, which reports errors to nobody:
// the reader that comes to the grain will meet them.
func newReadAhead(grain, grains, cacheBytes int64, load func(ctx context.Context, from, to int64)) *readAhead {
	// What is loaded ahead must not push itself out.
	r := &readAhead{grain: grain, grains: grains, window: min(aheadBytes, cacheBytes/4) / grain, load: load}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// note tells of a read of n bytes at off that is about to be done.
func (r *readAhead) note(off, n int64) {
	if r.window == 0 || n == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	last := (off + n - 1) / r.grain
	r.clock++
	s, known := r.stream(off, n)
	s.used = r.clock
	end := off + n
	if !known {
		*s = stream{start: off, next: end, queued: last + 1, used: r.clock}
		return
	}
	if end <= s.next {
		return // a late one of several requests under way
	}
	s.next = end
	s.queued = max(s.queued, last+1)
	window := min(max((end-s.start)/r.grain, 2), r.window)
	// In steps of half a window, so that what lies together is asked for together.
	if s.queued-(last+1) > window/2 {
		return
	}
	to := min(last+1+window, r.grains)
	if s.queued < to {
		r.enqueue(s.queued, to)
		s.queued = to
	}
}

// stream finds the stream that a read belongs to, or the one to forget for it.
// Readers with several requests under way (the kernel's own read-ahead) come a
// little out of order.
func (r *readAhead) stream(off, n int64) (s *stream, known bool) {
	oldest := &r.streams[0]
	for i := range r.streams {
		s := &r.streams[i]
		if s.next != 0 && off >= s.next-4*n && off <= s.next+4*n {
			return s, true
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	return oldest, false
}

// enqueue has the grains of [from, to) loaded. If there are too many, the
// oldest are left out: their reader is past them most likely.
func (r *readAhead) enqueue(from, to int64) {
	for step := max(aheadSpan/r.grain, 1); from < to; from += step {
		r.queue = append(r.queue, grainSpan{from, min(from+step, to)})
	}
	if over := len(r.queue) - aheadQueue; over > 0 {
		r.queue = r.queue[:copy(r.queue, r.queue[over:])]
	}
	for r.loaders < min(len(r.queue), aheadLoaders, max(2, runtime.GOMAXPROCS(0))) {
		r.loaders++
		r.wg.Go(r.run)
	}
}

// run loads grains until none is left.
func (r *readAhead) run() {
	for {
		s, ok := r.take()
		if !ok {
			return
		}
		r.load(r.ctx, s.from, s.to)
	}
}

func (r *readAhead) take() (grainSpan, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) == 0 || r.closed {
		r.loaders--
		return grainSpan{}, false
	}
	s := r.queue[0]
	r.queue = r.queue[:copy(r.queue, r.queue[1:])]
	return s, true
}

// claim gives a reader of the grains [first, to) what is queued of the spans that they lie in: it loads the grains
// up to the returned one with one call, instead of one by one until a loader comes to the span. What is queued
// before first stays queued.
func (r *readAhead) claim(first, to int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	end := to
	kept := r.queue[:0]
	for _, s := range r.queue {
		if s.from >= to || s.to <= first {
			kept = append(kept, s)
			continue
		}
		end = max(end, s.to)
		if s.from < first {
			kept = append(kept, grainSpan{s.from, first})
		}
	}
	r.queue = kept
	return end
}

// close stops loading and waits for the goroutines.
func (r *readAhead) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.wg.Wait()
}
