package fusefs

import (
	"context"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// textFile is a small file whose content is in memory.
type textFile struct {
	node
	content []byte
	time    time.Time
}

var (
	_ fs.NodeGetattrer = (*textFile)(nil)
	_ fs.NodeOpener    = (*textFile)(nil)
	_ fs.NodeReader    = (*textFile)(nil)
)

func (f *textFile) attr(a *fuse.Attr) { fileAttr(a, int64(len(f.content)), f.time) }

func (f *textFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.attr(&out.Attr)
	out.SetTimeout(forever)
	return 0
}

func (f *textFile) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, readOnly(flags)
}

// readOnly is EROFS for an open that wants to write.
func readOnly(flags uint32) syscall.Errno {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return syscall.EROFS
	}
	return 0
}

func (f *textFile) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off >= int64(len(f.content)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(f.content[off:min(off+int64(len(dest)), int64(len(f.content)))]), 0
}
