package restore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"iter"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/tidemark/tidemark/store"
)

const testGrain = 4096

// numberedGrains is a source of grains that hold their own number throughout.
type numberedGrains struct {
	reads atomic.Int64 // grains
	calls atomic.Int64 // of ReadGrains
	// hold, if set, is called in each read of a grain.
	hold func(ctx context.Context, grain int64) error
}

func (s *numberedGrains) Refs(_ context.Context, from int64, dst []store.Ref) error {
	for i := range dst {
		binary.BigEndian.PutUint64(dst[i].Hash[:], uint64(from+int64(i))+1)
	}
	return nil
}

func (s *numberedGrains) Runs(_ context.Context, from, to int64) iter.Seq2[store.Run, error] {
	return func(yield func(store.Run, error) bool) { yield(store.Run{From: from, To: to}, nil) }
}

func (s *numberedGrains) ReadGrains(ctx context.Context, refs []store.Ref, dst [][]byte, done func(i int, err error)) {
	s.calls.Add(1)
	var wg sync.WaitGroup
	for i, ref := range refs {
		wg.Go(func() { done(i, s.readGrain(ctx, ref, dst[i])) })
	}
	wg.Wait()
}

func (s *numberedGrains) IsGrain(ref store.Ref, p []byte) bool {
	return bytes.Equal(p, numbered(int64(binary.BigEndian.Uint64(ref.Hash[:]))-1))
}

func (s *numberedGrains) readGrain(ctx context.Context, ref store.Ref, dst []byte) error {
	s.reads.Add(1)
	n := int64(binary.BigEndian.Uint64(ref.Hash[:])) - 1
	if s.hold != nil {
		if err := s.hold(ctx, n); err != nil {
			return err
		}
	}
	copy(dst, numbered(n))
	return nil
}

func numbered(n int64) []byte {
	return bytes.Repeat(binary.BigEndian.AppendUint64(nil, uint64(n)), testGrain/8)
}

func numberedDisk(t *testing.T, s *numberedGrains, grains int64, cache *Cache) *PointDisk {
	t.Helper()
	d := newPointDisk(s, store.Root{Size: grains * testGrain, Grain: testGrain}, "disk0", cache)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func TestCacheKeepsItsBound(t *testing.T) {
	s := &numberedGrains{}
	c := NewCache(10 * testGrain)
	d := numberedDisk(t, s, 1000, c)
	p := make([]byte, testGrain)
	for i := range int64(1000) {
		if _, err := d.ReadAt(p, i*7%1000*testGrain); err != nil {
			t.Fatal(err)
		}
		if b := c.Stats().Bytes; b > 10*testGrain {
			t.Fatalf("cache holds %d bytes", b)
		}
	}
	if b := c.Stats().Bytes; b != 10*testGrain {
		t.Errorf("full cache holds %d bytes", b)
	}
}

func TestCacheDropsTheLeastRecentlyUsed(t *testing.T) {
	s := &numberedGrains{}
	d := numberedDisk(t, s, 100, NewCache(3*testGrain)) // too small for read-ahead
	read := func(grains ...int64) {
		for _, g := range grains {
			if _, err := d.ReadAt(make([]byte, 1), g*testGrain); err != nil {
				t.Fatal(err)
			}
		}
	}
	read(10, 20, 30, 10, 40) // 20 goes
	before := s.reads.Load()
	read(10, 30, 40)
	if n := s.reads.Load() - before; n != 0 {
		t.Errorf("%d grains were read again", n)
	}
	read(20)
	if n := s.reads.Load() - before; n != 1 {
		t.Errorf("the dropped grain was read %d times", n)
	}
}

func TestCacheSharesEqualContentBetweenDisks(t *testing.T) {
	s := &numberedGrains{}
	c := NewCache(1 << 20)
	for range 5 {
		d := numberedDisk(t, s, 10, c)
		if _, err := d.ReadAt(make([]byte, 1), 3*testGrain); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.reads.Load(); n != 1 {
		t.Errorf("a grain of five disks was read %d times", n)
	}
}

func TestConcurrentMissesReadOnce(t *testing.T) {
	const readers = 16
	gate := make(chan struct{})
	s := &numberedGrains{hold: func(context.Context, int64) error { <-gate; return nil }}
	c := NewCache(1 << 20)
	d := numberedDisk(t, s, 10, c)
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			p := make([]byte, testGrain)
			if _, err := d.ReadAt(p, 5*testGrain); err != nil || !bytes.Equal(p, numbered(5)) {
				t.Errorf("wrong content, %v", err)
			}
		})
	}
	waitFor(t, func() bool { st := c.Stats(); return st.Hits+st.Misses == readers })
	close(gate)
	wg.Wait()
	if n := s.reads.Load(); n != 1 {
		t.Errorf("grain was read %d times", n)
	}
}

// A reader that gives up must not take those down who wait for the same grain.
func TestCancelledLoaderDoesNotFailTheOthers(t *testing.T) {
	started := make(chan struct{})
	var first atomic.Bool
	s := &numberedGrains{hold: func(ctx context.Context, _ int64) error {
		if first.Swap(true) {
			return nil
		}
		close(started)
		<-ctx.Done()
		return ctx.Err()
	}}
	c := NewCache(1 << 20)
	d := numberedDisk(t, s, 10, c)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := d.ReadAtContext(ctx, make([]byte, 1), 0); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled reader: %v", err)
		}
	})
	<-started
	wg.Go(func() {
		p := make([]byte, testGrain)
		if _, err := d.ReadAt(p, 0); err != nil || !bytes.Equal(p, numbered(0)) {
			t.Errorf("the other reader: %v", err)
		}
	})
	waitFor(t, func() bool { return c.Stats().Hits == 1 })
	cancel()
	wg.Wait()
}

func TestWaitingReaderCanGiveUp(t *testing.T) {
	gate := make(chan struct{})
	s := &numberedGrains{hold: func(context.Context, int64) error { <-gate; return nil }}
	c := NewCache(1 << 20)
	d := numberedDisk(t, s, 10, c)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := d.ReadAt(make([]byte, 1), 0); err != nil {
			t.Error(err)
		}
	})
	waitFor(t, func() bool { return c.Stats().Misses == 1 })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := d.ReadAtContext(ctx, make([]byte, 1), 0)
		done <- err
	}()
	waitFor(t, func() bool { return c.Stats().Hits == 1 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(gate)
	wg.Wait()
}

func TestFailedGrainIsTriedAgainAndNamed(t *testing.T) {
	var fail atomic.Bool
	fail.Store(true)
	s := &numberedGrains{hold: func(_ context.Context, g int64) error {
		if g == 3 && fail.Load() {
			return &store.CorruptError{Object: "pack", What: "hash differs"}
		}
		return nil
	}}
	d := numberedDisk(t, s, 10, NewCache(1<<20))
	p := make([]byte, 10*testGrain)
	n, err := d.ReadAt(p, 100)
	var re *ReadError
	if n != 3*testGrain-100 || !errors.Is(err, ErrCorrupt) || !errors.As(err, &re) || re.Off != 3*testGrain || re.Len != testGrain || re.Disk != "disk0" {
		t.Fatalf("read over a corrupt grain: %d, %v", n, err)
	}
	if _, err := d.ReadAt(p[:testGrain], 4*testGrain); err != nil {
		t.Errorf("grain behind the corrupt one: %v", err)
	}
	fail.Store(false)
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Errorf("a failure was kept: %v", err)
	}
}

// With a cache of next to nothing every buffer is used again at once: a reader that
// looked at one too long would see another grain.
func TestBuffersAreNotRecycledUnderReaders(t *testing.T) {
	for _, capacity := range []int64{0, testGrain, 20 * testGrain, 64 * testGrain} {
		s := &numberedGrains{}
		c := NewCache(capacity)
		d := numberedDisk(t, s, 200, c)
		var wg sync.WaitGroup
		for r := range 8 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(r), 1))
				p := make([]byte, 4*testGrain)
				at := int64(0)
				for range 300 {
					if at++; rnd.IntN(4) == 0 || at > 196 {
						at = rnd.Int64N(197)
					}
					if _, err := d.ReadAt(p, at*testGrain); err != nil {
						t.Error(err)
						return
					}
					for k := range int64(4) {
						if !bytes.Equal(p[k*testGrain:(k+1)*testGrain], numbered(at+k)) {
							t.Errorf("grain %d has other content", at+k)
							return
						}
					}
				}
			})
		}
		wg.Wait()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if b := c.Stats().Bytes; b > capacity {
			t.Errorf("cache of %d bytes holds %d", capacity, b)
		}
	}
}
