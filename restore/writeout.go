package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sync/errgroup"
)

// The errors of [WriteTo] that a caller may want to tell apart. An existing file without Force is
// os.ErrExist.
var (
	ErrTooSmall = errors.New("device is smaller than the disk")
	ErrBusy     = errors.New("device is in use")
	ErrTarget   = errors.New("neither a file nor a block device")
)

// WriteOptions say how [WriteTo] works.
type WriteOptions struct {
	// Force replaces a file that exists.
	Force bool
	// Workers is how many pieces are read and written at once; 0 means 4.
	Workers int
	// Progress, if set, is told how many bytes of the disk are done, zeroes
	// included. It is called by one goroutine at a time.
	Progress func(done, total int64)
}

// WriteResult says what was written, in bytes of the disk: Data + Zero is its size.
type WriteResult struct {
	Data   int64 `json:"data"`   // written
	Zero   int64 `json:"zero"`   // left as holes of a file, or zeroed on a device
	Device bool  `json:"device"` // the target is a block device
}

// writePiece is how much a worker reads and writes at once, in bytes.
const writePiece = 1 << 20

// WriteTo writes all of d to a file or block device, durably.
//
// A file is sparse, has mode 0600, and gets its name only when it is complete; until then
// it is a hidden file beside it, which a failed call removes and a killed one
// leaves behind. A symbolic link is followed.
//
// A device is opened exclusively ([ErrBusy] if it is mounted or otherwise held) and must
// hold the whole disk ([ErrTooSmall]). Zero extents are zeroed; what lies behind the
// disk's end stays as it is. The first MiB, where partition tables and super
// blocks are, is zeroed first and written last, so that a device whose restore
// was killed does not look complete.
func WriteTo(ctx context.Context, d Disk, target string, o WriteOptions) (WriteResult, error) {
	if o.Workers <= 0 {
		o.Workers = 4
	}
	if target == "" || os.IsPathSeparator(target[len(target)-1]) {
		return WriteResult{}, fmt.Errorf("%q: %w", target, ErrTarget)
	}
	st, err := os.Stat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return writeFile(ctx, d, target, o)
	case err != nil:
		return WriteResult{}, err
	case st.Mode().IsRegular():
		if !o.Force {
			return WriteResult{}, &os.PathError{Op: "restore", Path: target, Err: os.ErrExist}
		}
		if target, err = filepath.EvalSymlinks(target); err != nil {
			return WriteResult{}, err
		}
		return writeFile(ctx, d, target, o)
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		return writeDevice(ctx, d, target, o)
	}
	return WriteResult{}, fmt.Errorf("%s: %w", target, ErrTarget)
}

func writeFile(ctx context.Context, d Disk, path string, o WriteOptions) (_ WriteResult, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".partial-*")
	if err != nil {
		return WriteResult{}, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			err = errors.Join(err, removeIfThere(f.Name()))
		}
	}()
	if err := f.Truncate(d.Size()); err != nil {
		return WriteResult{}, err
	}
	c := newCopier(d, f, o)
	if err := c.copy(ctx, 0, d.Size()); err != nil {
		return WriteResult{}, err
	}
	if err := f.Sync(); err != nil {
		return WriteResult{}, err
	}
	if err := publish(f.Name(), path, o.Force); err != nil {
		return WriteResult{}, err
	}
	return c.result, nil
}

// copier moves extents of a disk to a target.
type copier struct {
	disk    Disk
	target  io.WriterAt
	options WriteOptions
	// zero makes a range of the target zero; nil if it is so already.
	zero func(off, n int64) error

	mu     sync.Mutex
	result WriteResult
}

func newCopier(d Disk, target io.WriterAt, o WriteOptions) *copier {
	return &copier{disk: d, target: target, options: o}
}

// copy moves [from, to) with several workers.
func (c *copier) copy(ctx context.Context, from, to int64) error {
	g, ctx := errgroup.WithContext(ctx)
	pieces := make(chan Extent)
	for range c.options.Workers {
		g.Go(func() error { return c.work(ctx, pieces) })
	}
	g.Go(func() error {
		defer close(pieces)
		for e, err := range merged(c.disk.Extents(ctx, from, to-from)) {
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

// send cuts an extent into pieces: zeroes stay whole.
func send(ctx context.Context, pieces chan<- Extent, e Extent) error {
	for e.Len > 0 {
		p := e
		if !e.Zero {
			p.Len = min(e.Len, writePiece-e.Off%writePiece)
		}
		select {
		case pieces <- p:
		case <-ctx.Done():
			return ctx.Err()
		}
		e.Off, e.Len = e.Off+p.Len, e.Len-p.Len
	}
	return nil
}

func (c *copier) work(ctx context.Context, pieces <-chan Extent) error {
	buf := make([]byte, writePiece)
	for e := range pieces {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.piece(ctx, e, buf); err != nil {
			return err
		}
		c.done(e)
	}
	return nil
}

func (c *copier) piece(ctx context.Context, e Extent, buf []byte) error {
	if e.Zero {
		if c.zero == nil {
			return nil
		}
		return c.zero(e.Off, e.Len)
	}
	p := buf[:e.Len]
	if n, err := readAtContext(ctx, c.disk, p, e.Off); n < len(p) {
		return noEOF(err)
	}
	_, err := c.target.WriteAt(p, e.Off)
	return err
}

func (c *copier) done(e Extent) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.Zero {
		c.result.Zero += e.Len
	} else {
		c.result.Data += e.Len
	}
	if c.options.Progress != nil {
		c.options.Progress(c.result.Zero+c.result.Data, c.disk.Size())
	}
}
