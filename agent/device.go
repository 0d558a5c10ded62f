package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/cbt"
)

// readChunk is what one read asks of the device at most, in bytes: large enough that
// the device streams, small enough that the readers share the work.
const readChunk = 1 << 20

// readers is the number of concurrent reads; each also hashes and compresses. Changes lie
// scattered, so most of them wait for the device while others compute.
const readers = 8

// device is a disk that is being read. It reads past the host's page cache,
// but coherently with it: the kernel writes dirty pages of the range back first.
type device struct {
	path string
	size int64 // bytes
	file bool  // an image file
	f    *os.File
	lane *lane // of reads while the guest runs

	bytes, nanos atomic.Int64 // of all reads so far
}

// rate is what all readers together got of the device so far, in bytes per second. Time that one
// waited for a processor counts as reading.
func (d *device) rate() float64 {
	if n := d.nanos.Load(); n > 0 {
		return float64(d.bytes.Load()) / float64(n) * 1e9 * readers
	}
	return 200e6 // a modest guess until something was read
}

func openDevice(path string) (*device, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		f, err = os.Open(path) // a file system without O_DIRECT
	}
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s: size: %w", path, err)
	}
	if size == 0 {
		_ = f.Close()
		return nil, fmt.Errorf("%s: has no size: no medium, or not a disk", path)
	}
	st, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &device{path: path, size: size, file: st.Mode().IsRegular(), f: f}, nil
}

// same checks that what is read is what is tracked.
func (d *device) same(tracked cbt.Evidence) error { return SameDisk(d.f, d.size, tracked) }

// SameDisk checks that an open device or image file of size bytes is what is tracked: a path may
// lead to another device each time it is followed.
func SameDisk(f *os.File, size int64, tracked cbt.Evidence) error {
	if tracked.Size != size {
		return fmt.Errorf("it was opened with %d bytes and is tracked with %d", size, tracked.Size)
	}
	if tracked.Device == "" {
		return nil
	}
	if tracked.Method == cbt.MethodFile {
		h, _, err := unix.NameToHandleAt(int(f.Fd()), "", unix.AT_EMPTY_PATH)
		if err != nil {
			return fmt.Errorf("which file it is: %w", err)
		}
		if opened := fmt.Sprintf("%x:%x", h.Type(), h.Bytes()); opened != tracked.Handle {
			return fmt.Errorf("file %s was opened, %s is tracked", opened, tracked.Handle)
		}
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if opened := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)); opened != tracked.Device {
		return fmt.Errorf("device %s was opened, %s is tracked", opened, tracked.Device)
	}
	var seq uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKGETDISKSEQ, uintptr(unsafe.Pointer(&seq)))
	if errno == 0 && seq != tracked.DiskSeq {
		return fmt.Errorf("diskseq %d was opened, %d is tracked", seq, tracked.DiskSeq)
	}
	return nil
}

// sync makes what lies in the host's page cache reach the device, where the
// tracker sees it. It doesn't flush the device's own cache: reads see that.
func (d *device) sync() error {
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	if err := unix.SyncFileRange(int(d.f.Fd()), 0, 0, all); err != nil {
		return fmt.Errorf("sync %s: %w", d.path, err)
	}
	return nil
}

// alignedBuffer is page-aligned, as O_DIRECT wants it.
func alignedBuffer(n int) []byte {
	page := os.Getpagesize()
	b := make([]byte, n+page)
	skip := 0
	if r := int(addressOf(b) % uintptr(page)); r != 0 {
		skip = page - r
	}
	return b[skip : skip+n : skip+n]
}

// pieces cuts extents into reads of at most readChunk that begin at its multiples.
func pieces(x cbt.Extents) iter.Seq[cbt.Extent] {
	return func(yield func(cbt.Extent) bool) {
		for _, e := range x {
			for off, end := e.Off, e.Off+e.Len; off < end; {
				n := min(readChunk-off%readChunk, end-off)
				if !yield(cbt.Extent{Off: off, Len: n}) {
					return
				}
				off += n
			}
		}
	}
}

// read hands every byte of x to put, in pieces, from several goroutines. The
// piece is only valid during the call. It keeps the limits of d.lane; readNow does not.
func (d *device) read(ctx context.Context, x cbt.Extents, put func(ctx context.Context, off int64, p []byte) error) error {
	return d.readBy(ctx, x, put, d.lane.admit)
}

// readNow is read while a guest stands still.
func (d *device) readNow(ctx context.Context, x cbt.Extents, put func(ctx context.Context, off int64, p []byte) error) error {
	return d.readBy(ctx, x, put, func(context.Context, int64) ([]byte, func(), error) {
		b := d.lane.bufs.Get().(*[]byte)
		return *b, func() { d.lane.bufs.Put(b) }, nil
	})
}

func (d *device) readBy(ctx context.Context, x cbt.Extents, put func(ctx context.Context, off int64, p []byte) error,
	admit func(ctx context.Context, n int64) ([]byte, func(), error),
) error {
	g, work := errgroup.WithContext(ctx)
	todo := make(chan cbt.Extent)
	for range readers {
		g.Go(func() error {
			for e := range todo {
				if err := d.piece(work, e, put, admit); err != nil {
					return err
				}
			}
			return nil
		})
	}
	for e := range pieces(x) {
		select {
		case todo <- e:
			continue
		case <-work.Done():
		}
		break
	}
	close(todo)
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

func (d *device) piece(ctx context.Context, e cbt.Extent, put func(ctx context.Context, off int64, p []byte) error,
	admit func(ctx context.Context, n int64) ([]byte, func(), error),
) error {
	b, giveBack, err := admit(ctx, e.Len)
	if err != nil {
		return err
	}
	defer giveBack()
	if err := d.readAt(b[:e.Len], e.Off); err != nil {
		return err
	}
	return put(ctx, e.Off, b[:e.Len])
}

func (d *device) readAt(p []byte, off int64) error {
	// The end of a file need not be a multiple of the sector, but O_DIRECT reads
	// sectors: ask for more and take what there is.
	q := p
	if r := len(p) % 4096; r != 0 && off+int64(len(p)) == d.size && cap(p) >= len(p)+4096-r {
		q = p[:len(p)+4096-r]
	}
	begin := time.Now()
	n, err := d.f.ReadAt(q, off)
	if errors.Is(err, unix.EIO) && d.file {
		n, err = d.readCached(q, off)
	}
	d.nanos.Add(int64(time.Since(begin)))
	d.bytes.Add(int64(n))
	if n >= len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // the disk shrank
	}
	return fmt.Errorf("read %s at %d: %w", d.path, off, err)
}

// readCached reads through the page cache what a direct read could not: the kernel fails
// direct reads of an image file where they meet pages that are just being dirtied
// (IOMAP_DELALLOC in iomap_dio_iter of fs/iomap/direct-io.c). That they are dirty is
// marked when they are written back, so the piece is read again.
func (d *device) readCached(p []byte, off int64) (int, error) {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", d.f.Fd()))
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	return f.ReadAt(p, off)
}
