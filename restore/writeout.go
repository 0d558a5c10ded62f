package restore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The errors of [WriteTo] that a caller may want to tell apart. An existing file without
// Force or InPlace is os.ErrExist.
var (
	ErrTooSmall = errors.New("device is smaller than the disk")
	ErrBusy     = errors.New("in use by somebody else")
	ErrTarget   = errors.New("neither a file nor a block device")
)

// WriteOptions say how [WriteTo] works.
type WriteOptions struct {
	// Force replaces a file that exists: the old one is there until the new one is complete.
	Force bool
	// InPlace changes a file that exists where it differs. Meanwhile it is
	// neither the old disk nor the new one.
	InPlace bool
	// Blind writes all of a device, without reading it first.
	Blind bool
	// ReadBack reads all of the target when it is written, past the page cache, and
	// compares it: [ErrReadBack].
	ReadBack bool
	// Workers is how many pieces are read and written at once; 0 means 4.
	Workers int
	// Progress, if set, is told how many bytes of the disk are done, zeroes
	// included. It is called by one goroutine at a time.
	Progress func(done, total int64)
	// ReadingBack is Progress of reading back.
	ReadingBack func(done, total int64)
}

// WriteResult says what was written, in bytes of the disk: Data + Zero is its size.
type WriteResult struct {
	Data    int64 `json:"data"`    // of the disk
	Zero    int64 `json:"zero"`    // left as holes of a file, or zeroed on a device
	Written int64 `json:"written"` // changed on the target, by data or by zeroes: what it did not hold already
	Device  bool  `json:"device"`  // the target is a block device
	Resumed bool  `json:"resumed"` // an earlier call had begun the file
}

// WriteTo writes all of d to a file or block device, durably.
//
// A file is sparse, has mode 0600, and gets its name only when it is complete; until then
// it is .NAME.partial beside it. That stays when the call is killed or cancelled or the
// disk cannot be read for a while, and the next call goes on with it:
// what it holds already is found by its hashes. It is removed when writing it
// fails, or the disk is damaged. A symbolic link is followed. Two calls for one file: [ErrBusy].
//
// A device is opened exclusively ([ErrBusy] if it is mounted or otherwise held) and must
// hold the whole disk ([ErrTooSmall]). It is read first, unless Blind, and only what
// differs is written. Zero extents are zeroed, by discarding where the device can; what lies
// behind the disk's end stays as it is.
//
// Before a device, or a file in place, is changed, its first MiB is zeroed, where partition
// tables and super blocks are, and written last: so that a target whose restore was
// killed does not look complete.
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
		return writeFile(ctx, bulk(d), target, o)
	case err != nil:
		return WriteResult{}, err
	case st.Mode().IsRegular():
		if !o.Force && !o.InPlace {
			return WriteResult{}, &os.PathError{Op: "restore", Path: target, Err: os.ErrExist}
		}
		if target, err = filepath.EvalSymlinks(target); err != nil {
			return WriteResult{}, err
		}
		if o.InPlace {
			return writeInPlace(ctx, bulk(d), target, o)
		}
		return writeFile(ctx, bulk(d), target, o)
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		return writeDevice(ctx, bulk(d), target, o)
	}
	return WriteResult{}, fmt.Errorf("%s: %w", target, ErrTarget)
}

// Partial is the file that [WriteTo] writes until path is complete.
func Partial(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".partial")
}

// openPartial opens, locks and if need be makes the file that becomes path. begun
// tells whether it holds something.
func openPartial(path string) (f *sparseFile, begun bool, err error) {
	of, err := os.OpenFile(Partial(path), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, false, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, of.Close())
		}
	}()
	if f, err = newSparseFile(of); err != nil {
		return nil, false, err
	}
	if err := f.lock(); err != nil {
		if errors.Is(err, ErrOverlayBusy) {
			err = fmt.Errorf("%s is being restored: %w", path, ErrBusy)
		}
		return nil, false, err
	}
	// Who had the lock before may have given the file its name meanwhile, or removed it.
	mine, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if named, err := os.Lstat(f.Name()); err != nil || !os.SameFile(mine, named) {
		return nil, false, fmt.Errorf("%s was just restored: %w", path, ErrBusy)
	}
	if !mine.Mode().IsRegular() {
		return nil, false, fmt.Errorf("%s: %w", f.Name(), ErrTarget)
	}
	return f, mine.Size() > 0, nil
}

func writeFile(ctx context.Context, d bulkDisk, path string, o WriteOptions) (_ WriteResult, err error) {
	f, begun, err := openPartial(path)
	if err != nil {
		return WriteResult{}, err
	}
	c := &copier{disk: d, target: fileTarget{f}, options: o, empty: !begun}
	c.result.Resumed = begun
	defer func() {
		if err != nil && !worthKeeping(ctx, err, c.side) {
			err = errors.Join(err, removeIfThere(f.Name()))
		}
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	if err := f.Truncate(d.Size()); err != nil {
		return WriteResult{}, c.failed(ofTarget, err)
	}
	if err := c.copy(ctx, 0, d.Size()); err != nil {
		return WriteResult{}, err
	}
	if err := c.finish(ctx); err != nil {
		return WriteResult{}, err
	}
	if err := Publish(f.Name(), path, o.Force); err != nil {
		return WriteResult{}, c.failed(ofTarget, err)
	}
	return c.result, nil
}

// worthKeeping tells whether another call can go on with what one has written that ended with
// err.
func worthKeeping(ctx context.Context, err error, side failedSide) bool {
	if ctx.Err() != nil {
		return true
	}
	return side != ofTarget && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrReadBack)
}

// finish makes what was copied durable, and looks at it again if that is asked for.
func (c *copier) finish(ctx context.Context) error {
	if err := c.target.Sync(); err != nil {
		return c.failed(ofTarget, err)
	}
	if !c.options.ReadBack {
		return nil
	}
	return readBack(ctx, c.disk, c.target, c.options.Workers, c.options.ReadingBack)
}

// writeInPlace changes a file where it differs.
func writeInPlace(ctx context.Context, d bulkDisk, path string, o WriteOptions) (_ WriteResult, err error) {
	f, err := openTarget(path, 0)
	if err != nil {
		return WriteResult{}, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	if err := f.lock(); errors.Is(err, ErrOverlayBusy) {
		return WriteResult{}, fmt.Errorf("%s: %w", path, ErrBusy)
	} else if err != nil {
		return WriteResult{}, err
	}
	if err := f.alone(); err != nil {
		return WriteResult{}, fmt.Errorf("%s: %w", path, err)
	}
	st, err := f.Stat()
	if err != nil {
		return WriteResult{}, err
	}
	c := &copier{disk: d, target: fileTarget{f}, options: o}
	h := &headLast{copier: c}
	if st.Size() != d.Size() {
		if st.Size() > 0 {
			if err := h.take(); err != nil {
				return WriteResult{}, err
			}
		}
		if err := f.Truncate(d.Size()); err != nil {
			return WriteResult{}, err
		}
	}
	if err := h.copy(ctx); err != nil {
		return WriteResult{}, err
	}
	return c.result, c.finish(ctx)
}
