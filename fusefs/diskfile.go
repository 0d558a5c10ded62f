package fusefs

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/restore"
)

// diskFile is a disk of a point, or a partition of one.
type diskFile struct {
	node
	point *restore.PointDetails
	index int
	part  *guestfs.Partition // nil: the whole disk

	mu      sync.Mutex
	disk    *openDisk // nil if nobody has the file open
	users   int       // of disk
	blocks  uint64    // of 512 bytes with data; known if counted
	counted bool
}

// openDisk is a disk that is open for one or more handles.
type openDisk struct {
	restore.Disk
	closer io.Closer
}

var (
	_ fs.NodeGetattrer = (*diskFile)(nil)
	_ fs.NodeOpener    = (*diskFile)(nil)
	_ fs.FileReader    = (*diskHandle)(nil)
	_ fs.FileLseeker   = (*diskHandle)(nil)
	_ fs.FileReleaser  = (*diskHandle)(nil)
)

func (f *diskFile) info() restore.DiskInfo { return f.point.Disks[f.index] }

func (f *diskFile) size() int64 {
	if f.part != nil {
		return f.part.Len
	}
	return f.info().Size
}

func (f *diskFile) attr(a *fuse.Attr) {
	fileAttr(a, f.size(), f.point.Time)
	a.Blksize = uint32(max(f.info().Grain, 128<<10))
	a.Blocks = f.dataBlocks(a.Blocks)
}

func (f *diskFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.attr(&out.Attr)
	out.SetTimeout(forever)
	return 0
}

// countTime is how long a disk's data may be counted. cp and tar need only to
// see that there are holes; listing many big disks must not take minutes.
const countTime = 50 * time.Millisecond

// dataBlocks counts the blocks that hold data. What cannot be counted in time
// is taken for data. full is the number of all blocks.
func (f *diskFile) dataBlocks(full uint64) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.counted {
		return f.blocks
	}
	d, err := f.hold()
	if err != nil {
		return full // who opens it will see the error
	}
	defer f.drop()
	ctx, cancel := context.WithTimeout(f.tree.ctx, countTime)
	defer cancel()
	var zero int64
	for e, err := range d.Extents(ctx, 0, d.Size()) {
		if err != nil {
			break
		}
		if e.Zero {
			zero += e.Len
		}
	}
	f.blocks, f.counted = full-min(full, uint64(zero)/512), true
	return f.blocks
}

// hold opens the disk for one more user. The caller has f's lock.
func (f *diskFile) hold() (*openDisk, error) {
	if f.disk == nil {
		d, closer, err := f.tree.catalog.Open(f.tree.ctx, f.point, f.index)
		if err != nil {
			return nil, err
		}
		if f.part != nil {
			if d, err = restore.Section(d, f.part.Off, f.part.Len); err != nil {
				return nil, errors.Join(err, closer.Close())
			}
		}
		open := &openDisk{Disk: d, closer: closer}
		if err := f.tree.opened(open); err != nil {
			return nil, errors.Join(err, closer.Close())
		}
		f.disk = open
	}
	f.users++
	return f.disk, nil
}

// drop ends one use of the disk. The caller has f's lock.
func (f *diskFile) drop() {
	f.users--
	if f.users > 0 {
		return
	}
	if f.tree.closing(f.disk) {
		_ = f.disk.closer.Close() // it was only read
	}
	f.disk = nil
}

func (t *tree) opened(d *openDisk) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return context.Canceled
	}
	t.open[d] = true
	return nil
}

// closing tells whether d is the caller's to close.
func (t *tree) closing(d *openDisk) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	mine := t.open[d]
	delete(t.open, d)
	return mine
}

// Open lets the kernel keep what it read: the content never changes.
func (f *diskFile) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if errno := readOnly(flags); errno != 0 {
		return nil, 0, errno
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	d, err := f.hold()
	if err != nil {
		return nil, 0, f.errno(err)
	}
	return &diskHandle{file: f, disk: d}, fuse.FOPEN_KEEP_CACHE, 0
}

// diskHandle is an open diskFile.
type diskHandle struct {
	file *diskFile
	disk *openDisk
}

// Release closes the disk after its last handle.
func (h *diskHandle) Release(context.Context) syscall.Errno {
	h.file.mu.Lock()
	defer h.file.mu.Unlock()
	h.file.drop()
	return 0
}

// Read fails as a whole if part of the range cannot be read: the kernel would take a
// short read for the end of the file. It then asks again page by page.
func (h *diskHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := readAt(h.file.tree.ctx, h.disk, dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, h.file.errno(err)
	}
	return fuse.ReadResultData(dest[:n]), 0
}

func readAt(ctx context.Context, d *openDisk, p []byte, off int64) (int, error) {
	if r, ok := d.Disk.(restore.ReaderAtContext); ok {
		return r.ReadAtContext(ctx, p, off)
	}
	return d.ReadAt(p, off)
}

// Lseek finds data and holes.
func (h *diskHandle) Lseek(_ context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	size := h.disk.Size()
	if off >= uint64(size) {
		return 0, syscall.ENXIO
	}
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return 0, syscall.EINVAL
	}
	for e, err := range h.disk.Extents(h.file.tree.ctx, int64(off), size-int64(off)) {
		if err != nil {
			return 0, h.file.errno(err)
		}
		if e.Zero == (whence == unix.SEEK_HOLE) {
			return uint64(e.Off), 0
		}
	}
	if whence == unix.SEEK_HOLE {
		return uint64(size), 0
	}
	return 0, syscall.ENXIO
}
