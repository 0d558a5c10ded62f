package restore_test

import (
	"context"
	"io"
	"iter"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// emptyDisk is a disk of zeroes of so many bytes.
type emptyDisk int64

func (d emptyDisk) Size() int64 { return int64(d) }

func (d emptyDisk) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), max(int64(d)-off, 0))
	clear(p[:n])
	if int(n) < len(p) {
		return int(n), io.EOF
	}
	return int(n), nil
}

func (d emptyDisk) Extents(_ context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) {
		if off < int64(d) && n > 0 {
			yield(restore.Extent{Off: off, Len: min(n, int64(d)-off), Zero: true}, nil)
		}
	}
}

// brokenDisk fails to read the bytes [from, to).
type brokenDisk struct {
	disktest.Bytes
	from, to int64
	err      error
}

func (d brokenDisk) ReadAt(p []byte, off int64) (int, error) {
	if off < d.to && off+int64(len(p)) > d.from {
		n, _ := d.Bytes.ReadAt(p[:max(d.from-off, 0)], off)
		return n, d.err
	}
	return d.Bytes.ReadAt(p, off)
}

func (d brokenDisk) ReadAtContext(_ context.Context, p []byte, off int64) (int, error) {
	return d.ReadAt(p, off)
}
