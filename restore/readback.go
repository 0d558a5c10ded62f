package restore

import (
	"context"
	"errors"
	"fmt"

	"github.com/tidemark/tidemark/store"
)

// ErrReadBack is wrapped when what was written is not what the target gives back.
var ErrReadBack = errors.New("the target does not give back what was written")

// readBack reads all of the target, past the page cache, and compares it with the disk's
// hashes.
func readBack(ctx context.Context, d bulkDisk, t target, workers int, progress func(done, total int64)) error {
	if err := t.Sync(); err != nil {
		return err
	}
	if err := t.forget(); err != nil {
		return err
	}
	c := &copier{disk: d, target: t, options: WriteOptions{Progress: progress}}
	return eachPiece(ctx, d, 0, d.Size(), workers, func(ctx context.Context, e Extent, buf []byte) error {
		if err := compareBack(ctx, d, t, e, buf); err != nil {
			return err
		}
		c.done(WriteResult{Data: e.Len})
		return nil
	})
}

func compareBack(ctx context.Context, d bulkDisk, t target, e Extent, buf []byte) error {
	if e.Zero {
		return eachData(ctx, t, e, buf, func(p []byte, off int64) error {
			if !store.IsZero(p) {
				return fmt.Errorf("bytes %d to %d: %w", off, off+int64(len(p))-1, ErrReadBack)
			}
			return nil
		})
	}
	p := buf[:e.Len]
	if n, err := t.ReadAt(p, e.Off); n < len(p) {
		return fmt.Errorf("read the target: %w", noEOF(err))
	}
	runs, err := d.differences(ctx, p, e.Off)
	if err != nil {
		return err
	}
	if len(runs) > 0 {
		return fmt.Errorf("bytes %d to %d: %w", runs[0].Off, runs[0].Off+runs[0].Len-1, ErrReadBack)
	}
	return nil
}
