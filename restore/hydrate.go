package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/tidemark/tidemark/store"
)

// HydrateOptions say how [Hydratable.Hydrate] works.
type HydrateOptions struct {
	// Limit is how many bytes per second are copied at most; 0: no limit. Changes that are copied again count too, but
	// not those of the last round.
	Limit int64
	// Enough is how much may have changed, in bytes, when the last round is due; 0 means 8 MiB.
	Enough int64
	// Progress, if set, is told how many bytes of the disk are copied once. It is called by one
	// goroutine at a time.
	Progress func(done, total int64)
}

// Hydration is a disk that was copied to a target while it was used, but for what [Hydration.Finish] brings.
// It must be closed.
type Hydration struct {
	live   *Hydratable
	target target
	file   *sparseFile
	path   string // of the target
	device bool
	limit  *rate.Limiter
	result HydrateResult
}

// HydrateResult says what a hydration did, in bytes.
type HydrateResult struct {
	Size    int64 `json:"size"`
	Written int64 `json:"written"` // to the target, what it did not hold already; changes that were copied again included
	Last    int64 `json:"last"`    // copied in the last round
	Rounds  int   `json:"rounds"`
	Resumed bool  `json:"resumed"` // the target held something
	Device  bool  `json:"device"`
}

const (
	defaultEnough = 8 << 20
	// maxRounds bounds how often changes are copied again before the last round: a guest that
	// changes more than can be copied must be held up by that.
	maxRounds = 20
)

// Hydrate copies the disk to a file or block device while it is used: first what was
// asked for, then the rest in order, then what changed meanwhile, until that is little. The target
// holds nothing that can be used until Finish: a file is .NAME.partial beside its name, of a
// device the first MiB is zero.
//
// A call that was interrupted, also by kill -9 or a power cut, is taken up by the next one
// for the same target: what that holds is compared by its hashes, and only what
// differs is fetched and written. So nothing has to be kept about how far it came.
//
// Errors are those of [WriteTo]; the target of a failed call stays for the next one.
func (l *Hydratable) Hydrate(ctx context.Context, path string, o HydrateOptions) (_ *Hydration, err error) {
	h, err := l.openHydration(path)
	if err != nil {
		return nil, fmt.Errorf("hydrate to %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("hydrate to %s: %w", path, err), h.Close())
		}
	}()
	if o.Limit > 0 {
		h.limit = rate.NewLimiter(rate.Limit(o.Limit), hotPiece)
	}
	if o.Enough <= 0 {
		o.Enough = defaultEnough
	}
	if o.Progress == nil {
		o.Progress = func(int64, int64) {}
	}
	if h.device {
		// Until Finish it must not look like a disk.
		if err := h.target.zero(ctx, 0, min(headLen, l.Size())); err != nil {
			return nil, err
		}
		if err := h.target.Sync(); err != nil {
			return nil, err
		}
	}
	if err := h.first(ctx, o.Progress); err != nil {
		return nil, err
	}
	for h.result.Rounds = 1; h.result.Rounds < maxRounds && l.changed() > o.Enough; h.result.Rounds++ {
		if err := h.again(ctx, h.afterHead(l.takeDirty()), h.limit); err != nil {
			return nil, err
		}
	}
	return h, h.target.Sync()
}

func (l *Hydratable) openHydration(path string) (*Hydration, error) {
	h := &Hydration{live: l, path: path, result: HydrateResult{Size: l.Size()}}
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		var begun bool
		if h.file, begun, err = openPartial(path); err != nil {
			return nil, err
		}
		h.target, h.result.Resumed = fileTarget{h.file}, begun
		if err := h.file.Truncate(l.Size()); err != nil {
			return nil, errors.Join(err, h.file.Close())
		}
		return h, nil
	case err != nil:
		return nil, err
	case st.Mode().IsRegular():
		return nil, &os.PathError{Op: "hydrate", Path: path, Err: os.ErrExist}
	case st.Mode()&os.ModeDevice == 0 || st.Mode()&os.ModeCharDevice != 0:
		return nil, ErrTarget
	}
	if h.file, err = openTarget(path, unix.O_EXCL); errors.Is(err, unix.EBUSY) {
		return nil, ErrBusy
	} else if err != nil {
		return nil, err
	}
	size, err := h.file.Seek(0, io.SeekEnd)
	if err == nil && size < l.Size() {
		err = fmt.Errorf("%d bytes, the disk has %d: %w", size, l.Size(), ErrTooSmall)
	}
	if err != nil {
		return nil, errors.Join(err, h.file.Close())
	}
	h.target, h.device, h.result.Device, h.result.Resumed = deviceTarget{h.file}, true, true, true
	return h, nil
}

// first copies every piece once: those that are asked for as soon as they are.
func (h *Hydration) first(ctx context.Context, progress func(done, total int64)) error {
	size := h.live.Size()
	pieces := (size + hotPiece - 1) / hotPiece
	copied := make([]uint64, pieces/64+1)
	buf := make([]byte, hotPiece)
	done, next := int64(0), int64(0)
	for done < size {
		p := h.live.takeHot()
		if p < 0 {
			p = next
			next++
		}
		if p >= pieces || copied[p/64]>>(p%64)&1 == 1 {
			continue
		}
		copied[p/64] |= 1 << (p % 64)
		e := Extent{Off: p * hotPiece, Len: min(hotPiece, size-p*hotPiece)}
		// From here on a change is seen as one, so what is read now may be older.
		h.live.clean(p)
		if err := h.piece(ctx, e, buf[:e.Len]); err != nil {
			return err
		}
		done += e.Len
		progress(done, size)
	}
	return nil
}

// piece brings one piece to the target, where it differs.
func (h *Hydration) piece(ctx context.Context, e Extent, buf []byte) error {
	if h.device && e.Off == 0 { // comes last
		h.live.change(0, min(headLen, h.live.Size()))
		return nil
	}
	have := buf
	if n, err := h.target.ReadAt(have, e.Off); n < len(have) {
		return fmt.Errorf("read the target: %w", noEOF(err))
	}
	runs, err := h.live.overlay.differences(ctx, have, e.Off)
	if err != nil {
		return err
	}
	for _, run := range runs {
		part := buf[run.Off-e.Off:][:run.Len]
		if run.Zero {
			if err := h.pace(ctx, 0); err != nil {
				return err
			}
			if err := h.target.zero(ctx, run.Off, run.Len); err != nil {
				return err
			}
			h.result.Written += run.Len
			continue
		}
		if err := h.pace(ctx, len(part)); err != nil {
			return err
		}
		if err := h.live.overlay.readBulk(ctx, part, run.Off); err != nil {
			return err
		}
		if _, err := h.target.WriteAt(part, run.Off); err != nil {
			return err
		}
		h.result.Written += run.Len
	}
	return nil
}

// afterHead leaves out the head of a device, which stays a change: it comes last.
func (h *Hydration) afterHead(runs []Extent) []Extent {
	for h.device && len(runs) > 0 && runs[0].Off < headLen {
		first := &runs[0]
		n := min(first.Len, headLen-first.Off)
		h.live.change(first.Off, n)
		if n == first.Len {
			runs = runs[1:]
			continue
		}
		first.Off, first.Len = first.Off+n, first.Len-n
	}
	return runs
}

// again copies what changed.
func (h *Hydration) again(ctx context.Context, runs []Extent, limit *rate.Limiter) error {
	buf := make([]byte, hotPiece)
	for i, run := range runs {
		for run.Len > 0 {
			p := buf[:min(run.Len, hotPiece)]
			if limit != nil {
				if err := limit.WaitN(ctx, len(p)); err != nil {
					return h.putBack(runs[i:], err)
				}
			}
			if n, err := h.live.overlay.ReadAtContext(ctx, p, run.Off); n < len(p) {
				return h.putBack(runs[i:], noEOF(err))
			}
			if err := h.put(ctx, p, run.Off); err != nil {
				return h.putBack(runs[i:], err)
			}
			h.result.Written += int64(len(p))
			run.Off, run.Len = run.Off+int64(len(p)), run.Len-int64(len(p))
		}
	}
	return nil
}

func (h *Hydration) put(ctx context.Context, p []byte, off int64) error {
	if store.IsZero(p) {
		return h.target.zero(ctx, off, int64(len(p)))
	}
	_, err := h.target.WriteAt(p, off)
	return err
}

// putBack makes changes that were not copied changes again.
func (h *Hydration) putBack(runs []Extent, err error) error {
	for _, r := range runs {
		h.live.change(r.Off, r.Len)
	}
	return err
}

func (h *Hydration) pace(ctx context.Context, n int) error {
	if h.limit == nil || n == 0 {
		return ctx.Err()
	}
	return h.limit.WaitN(ctx, n)
}

// Finish copies what changed since, makes the target durable and whole, and gives a file its name. Nobody
// may write to the disk meanwhile, nor after it: what is written later is not on the target. If it fails, writing may
// go on, and it can be called again.
func (h *Hydration) Finish(ctx context.Context) (HydrateResult, error) {
	before := h.result.Written
	if h.device { // its head comes when all else is durable
		if err := errors.Join(h.again(ctx, h.afterHead(h.live.takeDirty()), nil), h.target.Sync()); err != nil {
			return HydrateResult{}, fmt.Errorf("hydrate to %s: %w", h.path, err)
		}
	}
	if err := h.again(ctx, h.live.takeDirty(), nil); err != nil {
		return HydrateResult{}, fmt.Errorf("hydrate to %s: %w", h.path, err)
	}
	if err := h.target.Sync(); err != nil {
		return HydrateResult{}, fmt.Errorf("hydrate to %s: %w", h.path, err)
	}
	if !h.device {
		if err := h.publish(); err != nil {
			return HydrateResult{}, fmt.Errorf("hydrate to %s: %w", h.path, err)
		}
	}
	h.result.Last = h.result.Written - before
	return h.result, nil
}

// publish gives the file its name, unless it has it already.
func (h *Hydration) publish() error {
	mine, err := h.file.Stat()
	if err != nil {
		return err
	}
	if named, err := os.Stat(h.path); err == nil && os.SameFile(mine, named) {
		return nil
	}
	return Publish(h.file.Name(), h.path, false)
}

// Close gives the target free.
func (h *Hydration) Close() error { return h.file.Close() }

// Path is the target.
func (h *Hydration) Path() string { return h.path }

// IsDevice tells whether the target is a block device.
func (h *Hydration) IsDevice() bool { return h.device }
