package restore

import (
	"errors"
	"fmt"
	"io"
	"iter"
)

// ErrRange is wrapped by the errors of calls that name bytes outside the disk:
// a negative offset or length, or a write past its end.
var ErrRange = errors.New("outside the disk")

// readSpan says how much of a read of n bytes at off lies on a disk of size
// bytes, and the error that ends it (io.EOF if it is cut).
func readSpan(off int64, n int, size int64) (int, error) {
	switch {
	case off < 0:
		return 0, fmt.Errorf("read of %d bytes at %d: %w", n, off, ErrRange)
	case n == 0:
		return 0, nil
	case off >= size:
		return 0, io.EOF
	case int64(n) > size-off:
		return int(size - off), io.EOF
	}
	return n, nil
}

// checkWrite returns an error unless [off, off+n) lies on a disk of size bytes.
func checkWrite(op string, off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%s of %d bytes at %d, disk of %d bytes: %w", op, n, off, size, ErrRange)
	}
	return nil
}

// extentSpan cuts [off, off+n) to a disk of size bytes.
func extentSpan(off, n, size int64) (from, to int64, err error) {
	if off < 0 || n < 0 {
		return 0, 0, fmt.Errorf("extents of %d bytes at %d: %w", n, off, ErrRange)
	}
	if off >= size {
		return size, size, nil
	}
	return off, off + min(n, size-off), nil
}

// extentMerger joins neighbouring extents of one kind on their way to yield.
type extentMerger struct {
	yield func(Extent, error) bool
	last  Extent
}

// add takes [from, to), which follows what was added before. It returns false
// once the consumer has had enough.
func (m *extentMerger) add(from, to int64, zero bool) bool {
	if from >= to {
		return true
	}
	if m.last.Len > 0 && m.last.Zero == zero {
		m.last.Len += to - from
		return true
	}
	ok := m.flush()
	m.last = Extent{Off: from, Len: to - from, Zero: zero}
	return ok
}

// flush hands over what is held back.
func (m *extentMerger) flush() bool {
	if m.last.Len == 0 {
		return true
	}
	e := m.last
	m.last = Extent{}
	return m.yield(e, nil)
}

// fail ends the sequence with err, after what is known so far.
func (m *extentMerger) fail(err error) {
	if m.flush() {
		m.yield(Extent{}, err)
	}
}

// merged joins neighbouring extents of one kind.
func merged(extents iter.Seq2[Extent, error]) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		m := &extentMerger{yield: yield}
		for e, err := range extents {
			if err != nil {
				m.fail(err)
				return
			}
			if !m.add(e.Off, e.Off+e.Len, e.Zero) {
				return
			}
		}
		m.flush()
	}
}
