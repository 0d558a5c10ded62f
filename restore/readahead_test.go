package restore

import (
	"bytes"
	"context"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

// waitFor waits until cond holds, and fails if it takes unreasonably long.
func waitFor(t *testing.T, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen")
		}
		runtime.Gosched()
	}
}

func TestSequentialReaderFindsGrainsLoaded(t *testing.T) {
	s := &numberedGrains{}
	c := NewCache(1 << 20)
	d := numberedDisk(t, s, 100, c)
	p := make([]byte, testGrain/2)
	for off := int64(0); off < 4*testGrain; off += int64(len(p)) {
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	// Some of the next come by themselves, no more than were read.
	waitFor(t, func() bool { return s.reads.Load() >= 4+2 })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n := s.reads.Load(); n > 4+4 {
		t.Errorf("%d grains were read for a reader of 4", n)
	}
}

// A reader of a few KiB at a time must not have each grain fetched by itself.
func TestReadAheadLoadsManyGrainsAtOnce(t *testing.T) {
	// A store takes its time for a request. Else the reader is past a span before a goroutine runs that could load it.
	s := &numberedGrains{hold: func(context.Context, int64) error { time.Sleep(time.Millisecond); return nil }}
	d := numberedDisk(t, s, 4096, NewCache(64<<20))
	p := make([]byte, testGrain/2)
	for off := int64(0); off < 4096*testGrain; off += int64(len(p)) {
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if reads, calls := s.reads.Load(), s.calls.Load(); reads != 4096 || calls > 128 {
		t.Errorf("%d grains were read, in %d calls", reads, calls)
	}
}

func TestReadAheadStaysWithinItsWindowAndDisk(t *testing.T) {
	s := &numberedGrains{}
	d := numberedDisk(t, s, 20, NewCache(1<<20))
	for g := range int64(20) {
		if _, err := d.ReadAt(make([]byte, testGrain), g*testGrain); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n := s.reads.Load(); n != 20 {
		t.Errorf("%d grains were read of 20", n)
	}
}

func TestRandomReaderIsNotReadAhead(t *testing.T) {
	s := &numberedGrains{}
	d := numberedDisk(t, s, 1000, NewCache(1<<20))
	for i := range int64(100) {
		if _, err := d.ReadAt(make([]byte, 512), i*379%1000*testGrain); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n := s.reads.Load(); n != 100 {
		t.Errorf("100 random reads read %d grains", n)
	}
}

func TestInterleavedReadersAreToldApart(t *testing.T) {
	s := &numberedGrains{}
	c := NewCache(1 << 20)
	d := numberedDisk(t, s, 1000, c)
	for g := range int64(4) {
		for _, start := range []int64{0, 300, 600} {
			if _, err := d.ReadAt(make([]byte, testGrain), (start+g)*testGrain); err != nil {
				t.Fatal(err)
			}
		}
	}
	waitFor(t, func() bool { return s.reads.Load() >= 3*(4+2) })
}

// While all loaders are busy, a reader in the queue takes its span over, instead of asking for grain by
// grain.
func TestReaderTakesAQueuedSpanOver(t *testing.T) {
	const begun = aheadBytes / testGrain // grains: the window is full at once
	const span = aheadSpan / testGrain
	release := make(chan struct{})
	ahead := context.Context(nil)
	s := &numberedGrains{}
	var read [4 * begun]atomic.Int64
	s.hold = func(ctx context.Context, grain int64) error {
		read[grain].Add(1)
		if ctx != ahead {
			return nil
		}
		<-release
		return nil
	}
	d := numberedDisk(t, s, 4*begun, NewCache(256<<20))
	ahead = d.ahead.ctx
	for _, off := range []int64{0, begun / 2 * testGrain} {
		if _, err := d.ReadAt(make([]byte, begun/2*testGrain), off); err != nil {
			t.Fatal(err)
		}
	}
	d.ahead.mu.Lock()
	queued := slices.Clone(d.ahead.queue)
	d.ahead.mu.Unlock()
	last := queued[len(queued)-1]
	if last.to-last.from != span {
		t.Fatalf("queued: %v", queued)
	}
	calls := s.calls.Load()
	p := make([]byte, testGrain)
	for g := last.from + 1; g < last.to; g++ {
		if _, err := d.ReadAt(p, g*testGrain); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, numbered(g)) {
			t.Fatalf("grain %d holds something else", g)
		}
	}
	// One for the span, one for what lies behind it: this reader has a stream of its own.
	if n := s.calls.Load() - calls; n > 2 {
		t.Errorf("a span of %d grains was read with %d calls", span, n)
	}
	close(release)
	// The grain before the reader is loaded by who would have loaded the span.
	for g := range last.to {
		waitFor(t, func() bool { return read[g].Load() > 0 })
		if n := read[g].Load(); n != 1 {
			t.Fatalf("grain %d was read %d times", g, n)
		}
	}
}

// Close must wait for loaders, and not for longer than their context takes.
func TestCloseStopsReadAhead(t *testing.T) {
	var inside atomic.Int64
	s := &numberedGrains{hold: func(ctx context.Context, g int64) error {
		if g < 4 {
			return nil
		}
		inside.Add(1)
		defer inside.Add(-1)
		<-ctx.Done()
		return ctx.Err()
	}}
	d := numberedDisk(t, s, 100, NewCache(1<<20))
	for g := range int64(3) {
		if _, err := d.ReadAt(make([]byte, testGrain), g*testGrain); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, func() bool { return inside.Load() > 0 })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n := inside.Load(); n != 0 {
		t.Errorf("%d loaders run after Close", n)
	}
}
