package restore

import (
	"context"
	"errors"
	"io"
	"iter"
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	hotPiece  = 1 << 20  // bytes that are copied at once, a multiple of every grain
	dirtyUnit = 64 << 10 // bytes that one mark of a change speaks of
	maxHot    = 1 << 16  // pieces that wait to be copied before others
	pieceMask = hotPiece / dirtyUnit
)

// Hydratable is an overlay that a machine works on. It remembers what was used, what was changed, and what
// failed, so that it can be hydrated ([Hydratable.Hydrate]) meanwhile. It costs 2 bits per
// 64 KiB and MiB of the disk. All use of the overlay must go through it.
type Hydratable struct {
	overlay *Overlay // not embedded: what it can do by other ways would go past this

	used  []atomic.Uint64 // bit per piece: it was asked for
	dirty []atomic.Uint64 // bit per unit: it changed since it was taken

	mu  sync.Mutex
	hot []int64 // pieces in the order in which they were first asked for, until they are taken
	err error   // the last one of a read or write
}

var (
	_ WritableDisk    = (*Hydratable)(nil)
	_ ReaderAtContext = (*Hydratable)(nil)
	_ Differ          = (*Hydratable)(nil)
	_ Layered         = (*Hydratable)(nil)
)

// NewHydratable watches over o, which stays the caller's to close.
func NewHydratable(o *Overlay) *Hydratable {
	words := func(unit int64) int64 { return (o.Size()/unit)/64 + 1 }
	return &Hydratable{overlay: o, used: make([]atomic.Uint64, words(hotPiece)), dirty: make([]atomic.Uint64, words(dirtyUnit))}
}

// Size implements [Disk].
func (l *Hydratable) Size() int64 { return l.overlay.Size() }

// Extents implements [Disk].
func (l *Hydratable) Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error] {
	return l.overlay.Extents(ctx, off, n)
}

// Diff implements [Differ].
func (l *Hydratable) Diff(ctx context.Context, old Disk, off, n int64) iter.Seq2[Change, error] {
	return l.overlay.Diff(ctx, old, off, n)
}

// Layers implements [Layered].
func (l *Hydratable) Layers(ctx context.Context, off, n int64) iter.Seq2[Layer, error] {
	return l.overlay.Layers(ctx, off, n)
}

// ReadAt implements io.ReaderAt.
func (l *Hydratable) ReadAt(p []byte, off int64) (int, error) {
	return l.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext implements ReaderAtContext.
func (l *Hydratable) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	l.use(off, int64(len(p)))
	n, err := l.overlay.ReadAtContext(ctx, p, off)
	return n, l.note(ctx, err)
}

// WriteAt implements io.WriterAt.
func (l *Hydratable) WriteAt(p []byte, off int64) (int, error) {
	l.use(off, int64(len(p)))
	n, err := l.overlay.WriteAt(p, off)
	// Also what failed may have changed something.
	l.change(off, int64(len(p)))
	return n, l.note(context.Background(), err)
}

// Zero implements WritableDisk.
func (l *Hydratable) Zero(off, n int64) error {
	err := l.overlay.Zero(off, n)
	l.change(off, n)
	return l.note(context.Background(), err)
}

// Trim implements WritableDisk.
func (l *Hydratable) Trim(off, n int64) error { return l.Zero(off, n) }

// Sync implements WritableDisk.
func (l *Hydratable) Sync() error { return l.note(context.Background(), l.overlay.Sync()) }

// Failure returns the last error of a read or write and forgets it.
func (l *Hydratable) Failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.err
	l.err = nil
	return err
}

func (l *Hydratable) note(ctx context.Context, err error) error {
	if err == nil || errors.Is(err, io.EOF) || ctx.Err() != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
	return err
}

// within cuts a range to the disk; a range outside has its error from the overlay.
func (l *Hydratable) within(off, n int64) (from, to int64) {
	size := l.Size()
	if off < 0 || n <= 0 || off >= size {
		return 0, 0
	}
	return off, off + min(n, size-off)
}

// use notes that a range was asked for.
func (l *Hydratable) use(off, n int64) {
	from, to := l.within(off, n)
	for p := from / hotPiece; p*hotPiece < to; p++ {
		if l.used[p/64].Load()>>(p%64)&1 == 1 || l.used[p/64].Or(1<<(p%64))>>(p%64)&1 == 1 {
			continue
		}
		l.mu.Lock()
		if len(l.hot) < maxHot {
			l.hot = append(l.hot, p)
		}
		l.mu.Unlock()
	}
}

// change notes that a range was changed. It is called when the change can be read.
func (l *Hydratable) change(off, n int64) {
	from, to := l.within(off, n)
	for u := from / dirtyUnit; u*dirtyUnit < to; u++ {
		if l.dirty[u/64].Load()>>(u%64)&1 == 0 {
			l.dirty[u/64].Or(1 << (u % 64))
		}
	}
}

// takeHot returns the next piece that was asked for, or -1.
func (l *Hydratable) takeHot() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.hot) == 0 {
		return -1
	}
	p := l.hot[0]
	l.hot = l.hot[1:]
	return p
}

// clean forgets that a piece changed: it is about to be read.
func (l *Hydratable) clean(piece int64) {
	u := piece * pieceMask
	l.dirty[u/64].And(^(uint64(1<<pieceMask-1) << (u % 64)))
}

// takeDirty returns the ranges that changed since they were last taken, ascending.
func (l *Hydratable) takeDirty() (out []Extent) {
	for w := range l.dirty {
		if l.dirty[w].Load() == 0 {
			continue
		}
		for set := l.dirty[w].Swap(0); set != 0; set &= set - 1 {
			off := (int64(w)*64 + int64(bits.TrailingZeros64(set))) * dirtyUnit
			n := min(dirtyUnit, l.Size()-off)
			out = appendRun(out, Extent{Off: off, Len: n})
		}
	}
	return out
}

// changed is how much would be taken, in bytes.
func (l *Hydratable) changed() (n int64) {
	for w := range l.dirty {
		n += int64(bits.OnesCount64(l.dirty[w].Load()))
	}
	return n * dirtyUnit
}
