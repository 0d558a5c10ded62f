package disktest

import (
	"bytes"
	"context"
	"io"
	"iter"

	"github.com/tidemark/tidemark/restore"
)

// hole is the size and alignment of the holes that Bytes reports.
const hole = 4096

// Bytes is a disk in memory. Aligned pieces of 4 KiB that are all zero are
// reported as holes. It is safe for concurrent use as long as nobody changes it.
type Bytes []byte

var (
	_ restore.Disk            = Bytes(nil)
	_ restore.ReaderAtContext = Bytes(nil)
)

// Size is the length in bytes.
func (b Bytes) Size() int64 { return int64(len(b)) }

// ReadAt implements io.ReaderAt.
func (b Bytes) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, restore.ErrRange
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= int64(len(b)) {
		return 0, io.EOF
	}
	n := copy(p, b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// ReadAtContext is ReadAt unless ctx is done.
func (b Bytes) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return b.ReadAt(p, off)
}

// Extents yields one extent for each 4 KiB.
func (b Bytes) Extents(ctx context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) {
		if off < 0 || n < 0 {
			yield(restore.Extent{}, restore.ErrRange)
			return
		}
		to := int64(len(b))
		if off < to {
			to = off + min(n, to-off)
		}
		for off < to {
			if err := ctx.Err(); err != nil {
				yield(restore.Extent{}, err)
				return
			}
			block := off - off%hole
			next := min(block+hole, to)
			whole := b[block:min(block+hole, int64(len(b)))]
			if !yield(restore.Extent{Off: off, Len: next - off, Zero: allZero(whole)}, nil) {
				return
			}
			off = next
		}
	}
}

var zeroes [hole]byte

func allZero(p []byte) bool { return bytes.Equal(p, zeroes[:len(p)]) }
