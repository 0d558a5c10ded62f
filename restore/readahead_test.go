package restore

import (
	"context"
	"runtime"
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
