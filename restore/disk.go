package restore

import (
	"context"
	"io"
	"iter"
)

// Extent is a run of bytes of a disk that is either data or zeroes.
type Extent struct {
	Off  int64 // bytes from the start of the disk
	Len  int64 // bytes, never 0
	Zero bool  // true: every byte reads as zero and nothing is stored for it
}

// Disk is an immutable block image.
//
// All methods are safe for concurrent use. Close is not part of it: whoever
// opened the disk closes what lies below it, after the last reader is done.
type Disk interface {
	// ReadAt follows io.ReaderAt: any offset and length, zeroes where nothing
	// is stored, io.EOF when the range reaches past Size.
	io.ReaderAt

	// Size is the length of the disk in bytes. It never changes.
	Size() int64

	// Extents yields runs in ascending order that cover exactly
	// [off, off+n) cut to the disk's size. Neighbouring runs may be of the same
	// kind. After a non-nil error nothing follows. It reads maps, not data.
	Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error]
}

// WritableDisk is a Disk that takes writes, such as an [Overlay].
//
// A write is durable once a Sync that began after it returned has returned nil. All
// methods are safe for concurrent use; overlapping concurrent writes land in
// either order, whole blocks of the implementation at a time.
type WritableDisk interface {
	Disk
	io.WriterAt

	// Zero makes [off, off+n) read as zeroes and frees its space if it can.
	Zero(off, n int64) error

	// Trim tells that the content of [off, off+n) is no longer needed. It reads
	// as zeroes afterwards.
	Trim(off, n int64) error

	// Sync makes all completed writes durable.
	Sync() error
}

// ReaderAtContext is implemented by disks whose reads can be cancelled.
type ReaderAtContext interface {
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
}

// Filer is implemented by disks whose bytes also lie in one plain file at the
// same offsets, so that a server can use sendfile or splice.
type Filer interface {
	// File returns the descriptor that backs [off, off+n) and true, or false if
	// the range must be read through ReadAt. The caller must not close it, nor
	// move its offset.
	File(off, n int64) (fd uintptr, ok bool)
}

// WriteFiler is implemented by writable disks of which parts lie in a plain file, so that a
// server can have the kernel write there.
type WriteFiler interface {
	// WriteFile returns the descriptor, and the offset in its file, to which a write of
	// [off, off+n) may go instead of WriteAt, in any pieces; or false. It counts as
	// returned from when the last piece is there. Nothing else may be written there.
	// The caller must not close the descriptor, nor move its offset.
	WriteFile(off, n int64) (fd uintptr, at int64, ok bool)
}
