package disktest

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/tidemark/tidemark/restore"
)

// Writable makes the disks that [RunWritable] checks.
type Writable struct {
	// New makes a writable disk that shows content.
	New func(t *testing.T, content []byte) restore.WritableDisk

	// Reopen opens anew what lies below a disk that New or Reopen made, after
	// closing it. Nil if the implementation does not outlive its process.
	Reopen func(t *testing.T, d restore.WritableDisk) restore.WritableDisk
}

// RunWritable checks the contract of [restore.WritableDisk], and that of
// [restore.Disk] on disks before and after they were written.
func RunWritable(t *testing.T, w Writable) {
	t.Helper()
	t.Run("unwritten", func(t *testing.T) {
		Run(t, func(t *testing.T, content []byte) restore.Disk { return w.New(t, content) })
	})
	t.Run("written over", func(t *testing.T) {
		Run(t, func(t *testing.T, content []byte) restore.Disk {
			d := w.New(t, Content(len(content), 77))
			return writeAll(t, d, content)
		})
	})
	t.Run("model", func(t *testing.T) { checkModel(t, w) })
	t.Run("range", func(t *testing.T) { checkWriteRange(t, w) })
	t.Run("concurrent writers of one block", func(t *testing.T) { checkSharedBlocks(t, w) })
	t.Run("readers beside writers", func(t *testing.T) { checkReadersBesideWriters(t, w) })
}

// writeAll brings d to content by writes of odd shapes, zeroes by Zero and Trim.
func writeAll(t *testing.T, d restore.WritableDisk, content []byte) restore.Disk {
	t.Helper()
	rnd := rand.New(rand.NewPCG(8, 8))
	for off := 0; off < len(content); {
		end := min(off+1+rnd.IntN(100_000), len(content))
		p := content[off:end]
		var err error
		switch {
		case !bytes.Equal(p, make([]byte, len(p))):
			_, err = d.WriteAt(p, int64(off))
		case rnd.IntN(2) == 0:
			err = d.Zero(int64(off), int64(len(p)))
		default:
			err = d.Trim(int64(off), int64(len(p)))
		}
		if err != nil {
			t.Fatalf("write of %d+%d: %v", off, len(p), err)
		}
		off = end
	}
	return d
}

// checkModel runs random operations on a disk and on a slice of bytes beside it.
func checkModel(t *testing.T, w Writable) {
	rapid.Check(t, func(rt *rapid.T) {
		size := rapid.SampledFrom([]int{512, 4096, 3*4096 + 512, 100_001, 1<<20 + 70_144}).Draw(rt, "size")
		model := Content(size, rapid.Uint64().Draw(rt, "seed"))
		d := w.New(t, bytes.Clone(model))
		defer func() { closeNow(rt, d) }()
		span := func(rt *rapid.T) (off, n int64) {
			unit := rapid.SampledFrom([]int{1, 512, 4096, 64 << 10}).Draw(rt, "unit")
			off = int64(rapid.IntRange(0, size/unit).Draw(rt, "off") * unit)
			n = int64(rapid.IntRange(0, 20).Draw(rt, "n") * unit)
			if rapid.IntRange(0, 9).Draw(rt, "long") == 0 {
				n = int64(size)
			}
			return off, min(n, int64(size)-off)
		}
		zero := func(op func(off, n int64) error) func(*rapid.T) {
			return func(rt *rapid.T) {
				off, n := span(rt)
				if err := op(off, n); err != nil {
					rt.Fatalf("zeroing %d+%d: %v", off, n, err)
				}
				clear(model[off : off+n])
			}
		}
		actions := map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				off, n := span(rt)
				p := Content(int(n), rapid.Uint64().Draw(rt, "data"))
				if m, err := d.WriteAt(p, off); m != len(p) || err != nil {
					rt.Fatalf("WriteAt(%d bytes, %d): %d, %v", n, off, m, err)
				}
				copy(model[off:], p)
			},
			"zero": zero(func(off, n int64) error { return d.Zero(off, n) }),
			"trim": zero(func(off, n int64) error { return d.Trim(off, n) }),
			"read": func(rt *rapid.T) {
				off, n := span(rt)
				got := make([]byte, n)
				if m, err := d.ReadAt(got, off); m != int(n) || err != nil && n > 0 {
					rt.Fatalf("ReadAt(%d bytes, %d): %d, %v", n, off, m, err)
				}
				if at := differ(got, model[off:off+n]); at >= 0 {
					rt.Fatalf("ReadAt(%d bytes, %d) differs at %d", n, off, at)
				}
			},
			"extents": func(rt *rapid.T) {
				off, n := span(rt)
				if err := spanError(rt.Context(), d, model, off, n); err != nil {
					rt.Fatal(err)
				}
			},
			"sync": func(rt *rapid.T) {
				if rapid.IntRange(0, 2).Draw(rt, "really") > 0 {
					return // it is slow
				}
				if err := d.Sync(); err != nil {
					rt.Fatalf("sync: %v", err)
				}
			},
		}
		if w.Reopen != nil {
			actions["reopen"] = func(rt *rapid.T) {
				if rapid.IntRange(0, 2).Draw(rt, "really") > 0 {
					return
				}
				if err := d.Sync(); err != nil {
					rt.Fatalf("sync: %v", err)
				}
				d = w.Reopen(t, d)
			}
		}
		rt.Repeat(actions)
		got := make([]byte, size)
		if n, err := d.ReadAt(got, 0); n != size || err != nil {
			rt.Fatalf("reading the whole disk: %d, %v", n, err)
		}
		if at := differ(got, model); at >= 0 {
			rt.Fatalf("in the end the disk differs at %d", at)
		}
	})
}

func closeNow(rt *rapid.T, d restore.Disk) {
	if c, ok := d.(interface{ Close() error }); ok {
		if err := c.Close(); err != nil {
			rt.Errorf("close: %v", err)
		}
	}
}

func checkWriteRange(t *testing.T, w Writable) {
	content := Content(10_000, 10)
	d := w.New(t, bytes.Clone(content))
	closeAtEnd(t, d)
	for _, s := range [][2]int64{{-1, 1}, {10_000, 1}, {9_999, 2}, {math.MaxInt64, 1}, {math.MaxInt64 - 1, 4}} {
		if n, err := d.WriteAt(make([]byte, s[1]), s[0]); n != 0 || err == nil {
			t.Errorf("write of %d bytes at %d: %d, %v, want an error", s[1], s[0], n, err)
		}
		for name, op := range map[string]func(off, n int64) error{"zero": d.Zero, "trim": d.Trim} {
			if err := op(s[0], s[1]); err == nil {
				t.Errorf("%s of %d bytes at %d: no error", name, s[1], s[0])
			}
		}
	}
	if err := errors.Join(d.Zero(0, -1), nil); err == nil {
		t.Error("zero of -1 bytes: no error")
	}
	if err := errors.Join(d.Zero(10_000, 0), d.Trim(0, 0)); err != nil {
		t.Errorf("zero of nothing: %v", err)
	}
	checkWhole(t, d, content)
}

// checkSharedBlocks has many writers fill neighbouring slots of the same blocks:
// none may undo another's.
func checkSharedBlocks(t *testing.T, w Writable) {
	const writers, slot, size = 8, 128, 1 << 20
	content := Content(size, 11)
	d := w.New(t, bytes.Clone(content))
	closeAtEnd(t, d)
	var wg sync.WaitGroup
	start := make(chan struct{})
	for g := range writers {
		p := bytes.Repeat([]byte{byte(g + 1)}, slot)
		for off := g * slot; off < size; off += writers * slot {
			if g == writers-1 {
				clear(content[off : off+slot])
			} else {
				copy(content[off:], p)
			}
		}
		wg.Go(func() {
			<-start
			for off := g * slot; off < size; off += writers * slot {
				var err error
				if g == writers-1 {
					err = d.Zero(int64(off), slot)
				} else {
					_, err = d.WriteAt(p, int64(off))
				}
				if err != nil {
					t.Errorf("writer %d: %v", g, err)
					return
				}
			}
		})
	}
	close(start)
	wg.Wait()
	checkWhole(t, d, content)
}

// checkReadersBesideWriters lets readers watch sectors that move through known
// values, with blocks being written, zeroed and synced around them.
func checkReadersBesideWriters(t *testing.T, w Writable) {
	const sector, sectors, rounds = 512, 512, 20
	d := w.New(t, bytes.Repeat([]byte{1}, sector*sectors))
	closeAtEnd(t, d)
	var writers, readers sync.WaitGroup
	stop := make(chan struct{})
	fail := make(chan error, 8)
	report := func(err error) {
		select {
		case fail <- err:
		default:
		}
	}
	for g := range 4 {
		writers.Go(func() {
			for round := range rounds {
				for s := g; s < sectors; s += 4 {
					var err error
					if (round+s)%5 == 4 {
						err = d.Zero(int64(s*sector), sector)
					} else {
						_, err = d.WriteAt(bytes.Repeat([]byte{byte(round + 2)}, sector), int64(s*sector))
					}
					if err != nil {
						report(err)
						return
					}
				}
				if g == 0 {
					if err := d.Sync(); err != nil {
						report(err)
						return
					}
				}
			}
		})
	}
	for g := range 3 {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 12))
			p := make([]byte, 4*sector)
			for {
				select {
				case <-stop:
					return
				default:
				}
				s := rnd.IntN(sectors - 3)
				if n, err := d.ReadAt(p, int64(s*sector)); n != len(p) || err != nil {
					report(fmt.Errorf("read beside writers: %d, %w", n, err))
					return
				}
				for _, c := range p {
					if c > rounds+1 {
						report(fmt.Errorf("read beside writers saw byte %#x that nobody wrote", c))
						return
					}
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	select {
	case err := <-fail:
		t.Fatal(err)
	default:
	}
	want := make([]byte, 0, sector*sectors)
	for s := range sectors {
		last := byte(rounds + 1)
		if (rounds-1+s)%5 == 4 {
			last = 0
		}
		want = append(want, bytes.Repeat([]byte{last}, sector)...)
	}
	checkWhole(t, d, want)
}
