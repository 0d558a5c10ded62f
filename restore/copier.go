package restore

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/store"
)

// copyPiece is how much a worker reads and writes at once, in bytes: a multiple of
// every grain. zeroPiece is the same for zeroes that the target is searched for.
const (
	copyPiece = 4 << 20
	zeroPiece = 64 << 20
)

// copier moves a disk to a target, piece by piece. Memory: per worker a piece, or
// two if it compares.
type copier struct {
	disk    bulkDisk
	target  target
	options WriteOptions

	// empty: the target holds nothing but zeroes, so there is nothing to compare with.
	empty bool
	// blind: what the target holds is unknown, and is not looked at.
	blind bool
	// before is called before the first change of the target, by every worker that is about
	// to make one; it may be nil.
	before func() error

	mu     sync.Mutex
	result WriteResult
	side   failedSide
}

// failedSide tells whose the first error was.
type failedSide int

const (
	neither failedSide = iota
	ofDisk
	ofTarget
)

// copy moves [from, to) with several workers.
func (c *copier) copy(ctx context.Context, from, to int64) error {
	return eachPiece(ctx, c.disk, from, to, c.options.Workers, func(ctx context.Context, e Extent, buf []byte) error {
		r, err := c.piece(ctx, e, buf)
		if err != nil {
			return err
		}
		c.done(r)
		return nil
	})
}

// eachPiece calls work for all pieces of [from, to), by several workers, each with a
// buffer of copyPiece bytes.
func eachPiece(ctx context.Context, d Disk, from, to int64, workers int, work func(ctx context.Context, e Extent, buf []byte) error) error {
	g, ctx := errgroup.WithContext(ctx)
	pieces := make(chan Extent)
	for range workers {
		g.Go(func() error {
			buf := make([]byte, copyPiece)
			for e := range pieces {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := work(ctx, e, buf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(pieces)
		for e, err := range merged(d.Extents(ctx, from, to-from)) {
			if err != nil {
				return err
			}
			if err := send(ctx, pieces, e); err != nil {
				return err
			}
		}
		return nil
	})
	return g.Wait()
}

// send cuts an extent into pieces.
func send(ctx context.Context, pieces chan<- Extent, e Extent) error {
	size := int64(copyPiece)
	if e.Zero {
		size = zeroPiece
	}
	for e.Len > 0 {
		p := e
		p.Len = min(e.Len, size-e.Off%size)
		select {
		case pieces <- p:
		case <-ctx.Done():
			return ctx.Err()
		}
		e.Off, e.Len = e.Off+p.Len, e.Len-p.Len
	}
	return nil
}

// piece brings one piece to the target and says what that took.
func (c *copier) piece(ctx context.Context, e Extent, buf []byte) (r WriteResult, err error) {
	if e.Zero {
		r.Zero = e.Len
		r.Written, err = c.zeroes(ctx, e, buf)
	} else {
		r.Data = e.Len
		r.Written, err = c.data(ctx, e, buf[:e.Len])
	}
	return r, err
}

// zeroes makes a piece of the target zero and returns how much of it was not.
func (c *copier) zeroes(ctx context.Context, e Extent, buf []byte) (written int64, err error) {
	if c.empty {
		return 0, nil
	}
	if c.blind {
		return e.Len, c.clear(ctx, e.Off, e.Len)
	}
	err = eachData(ctx, c.target, e, buf, func(p []byte, off int64) error {
		for _, run := range nonZero(p, off) {
			if err := c.clear(ctx, run.Off, run.Len); err != nil {
				return err
			}
			written += run.Len
		}
		return nil
	})
	return written, err
}

// nonZero returns the runs of p, in steps of 64 KiB of the disk, that are not all
// zeroes.
func nonZero(p []byte, off int64) (runs []Extent) {
	const step = 64 << 10
	for len(p) > 0 {
		n := min(step-int(off%step), len(p))
		if !store.IsZero(p[:n]) {
			runs = appendRun(runs, Extent{Off: off, Len: int64(n)})
		}
		p, off = p[n:], off+int64(n)
	}
	return runs
}

// eachData reads what the target may hold in a piece.
func eachData(ctx context.Context, t target, e Extent, buf []byte, look func(p []byte, off int64) error) error {
	at, end := e.Off, e.Off+e.Len
	for at < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		from, to, err := t.data(at, end)
		if err != nil {
			return err
		}
		if from >= end {
			return nil
		}
		p := buf[:min(to-from, int64(len(buf)))]
		if n, err := t.ReadAt(p, from); n < len(p) {
			return fmt.Errorf("read the target: %w", noEOF(err))
		}
		if err := look(p, from); err != nil {
			return err
		}
		at = from + int64(len(p))
	}
	return nil
}

// data brings a piece of data to the target and returns how much of it was not there.
func (c *copier) data(ctx context.Context, e Extent, p []byte) (written int64, err error) {
	runs := []Extent{e}
	if !c.empty && !c.blind {
		if n, err := c.target.ReadAt(p, e.Off); n < len(p) {
			return 0, c.failed(ofTarget, fmt.Errorf("read the target: %w", noEOF(err)))
		}
		if runs, err = c.disk.differences(ctx, p, e.Off); err != nil {
			return 0, c.failed(ofDisk, err)
		}
	}
	for _, run := range runs {
		part := p[run.Off-e.Off:][:run.Len]
		if err := c.disk.readBulk(ctx, part, run.Off); err != nil {
			return written, c.failed(ofDisk, err)
		}
		if err := c.change(); err != nil {
			return written, err
		}
		if _, err := c.target.WriteAt(part, run.Off); err != nil {
			return written, c.failed(ofTarget, err)
		}
		written += run.Len
	}
	return written, nil
}

func (c *copier) clear(ctx context.Context, off, n int64) error {
	if err := c.change(); err != nil {
		return err
	}
	return c.failed(ofTarget, c.target.zero(ctx, off, n))
}

// change is called before the target is changed.
func (c *copier) change() error {
	if c.before == nil {
		return nil
	}
	return c.failed(ofTarget, c.before())
}

// failed notes on which side the first failure was.
func (c *copier) failed(side failedSide, err error) error {
	if err == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.side == neither {
		c.side = side
	}
	return err
}

func (c *copier) done(r WriteResult) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.result.Data += r.Data
	c.result.Zero += r.Zero
	c.result.Written += r.Written
	if c.options.Progress != nil {
		c.options.Progress(c.result.Zero+c.result.Data, c.disk.Size())
	}
}
