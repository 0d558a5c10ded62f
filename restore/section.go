package restore

import (
	"context"
	"fmt"
	"iter"
)

// section is a piece of a disk as a disk of its own.
type section struct {
	disk   Disk
	off, n int64
}

var _ ReaderAtContext = section{}

// Section shows the bytes [off, off+n) of d as a disk, such as a partition. The
// error is [ErrRange] if they are not all on d.
func Section(d Disk, off, n int64) (Disk, error) {
	if err := checkWrite("section", off, n, d.Size()); err != nil {
		return nil, err
	}
	return section{disk: d, off: off, n: n}, nil
}

func (s section) Size() int64 { return s.n }

func (s section) ReadAt(p []byte, off int64) (int, error) {
	return s.ReadAtContext(context.Background(), p, off)
}

func (s section) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, eof := readSpan(off, len(p), s.n)
	if n == 0 {
		return 0, eof
	}
	if done, err := readAtContext(ctx, s.disk, p[:n], s.off+off); done < n {
		return done, noEOF(err)
	}
	return n, eof
}

func (s section) Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		from, to, err := extentSpan(off, n, s.n)
		if err != nil {
			yield(Extent{}, fmt.Errorf("section: %w", err))
			return
		}
		for e, err := range s.disk.Extents(ctx, s.off+from, to-from) {
			e.Off -= s.off
			if err != nil {
				e = Extent{}
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}
