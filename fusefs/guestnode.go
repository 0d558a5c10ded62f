package fusefs

import (
	"context"
	"errors"
	"io"
	"iter"
	"strconv"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/guestfs"
)

// guestVolume is a guest's file system.
type guestVolume struct {
	name string
	id   string // names it for good, for inode numbers
	tree guestfs.Tree
}

func (v *guestVolume) what(a guestfs.Attr) []string {
	return []string{"guest", v.id, strconv.FormatUint(a.Dev, 10), strconv.FormatUint(a.Ino, 10)}
}

// guestNode is a file of any kind in a guest's file system. Hard links are one node.
type guestNode struct {
	node
	volume *guestVolume
	path   string // one of its paths
	attr   guestfs.Attr

	mu     sync.Mutex
	xattrs map[string][]byte // nil: not read yet
}

var (
	_ fs.NodeGetattrer   = (*guestNode)(nil)
	_ fs.NodeLookuper    = (*guestNode)(nil)
	_ fs.NodeReaddirer   = (*guestNode)(nil)
	_ fs.NodeReadlinker  = (*guestNode)(nil)
	_ fs.NodeOpener      = (*guestNode)(nil)
	_ fs.NodeGetxattrer  = (*guestNode)(nil)
	_ fs.NodeListxattrer = (*guestNode)(nil)
	_ fs.FileReader      = (*guestHandle)(nil)
	_ fs.FileLseeker     = (*guestHandle)(nil)
)

func guestAttr(a *fuse.Attr, g guestfs.Attr) {
	a.Mode = g.Mode
	a.Nlink = g.Nlink
	a.Owner = fuse.Owner{Uid: g.UID, Gid: g.GID}
	a.Size = uint64(g.Size)
	a.Blocks = uint64(g.Blocks)
	a.Blksize = g.Blksize
	major, minor := unix.Major(g.Rdev), unix.Minor(g.Rdev)
	a.Rdev = minor&0xff | major<<8 | minor&^0xff<<12 // the kernel's new_encode_dev
	a.SetTimes(&g.Atime, &g.Mtime, &g.Ctime)
	// Times before 1970 are negative seconds.
	a.Atime, a.Mtime, a.Ctime = uint64(g.Atime.Unix()), uint64(g.Mtime.Unix()), uint64(g.Ctime.Unix())
}

func (n *guestNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	guestAttr(&out.Attr, n.attr)
	out.SetTimeout(forever)
	return 0
}

func (n *guestNode) below(name string) string {
	if n.path == "" {
		return name
	}
	return n.path + "/" + name
}

// guestPath names an entry of which a directory's reader has seen the attributes.
type guestPath struct{ volume, path string }

func (n *guestNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	path := n.below(name)
	key := guestPath{n.volume.id, path}
	a, ok := n.tree.seen.Get(key)
	if ok {
		n.tree.seen.Remove(key) // the kernel keeps it now
	} else {
		var err error
		if a, err = n.volume.tree.Lstat(n.tree.ctx, path); err != nil {
			return nil, n.guestErrno(err)
		}
	}
	guestAttr(&out.Attr, a)
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	c := &guestNode{node: node{tree: n.tree}, volume: n.volume, path: path, attr: a}
	return n.child(ctx, c, a.Mode&syscall.S_IFMT, n.volume.what(a)...), 0
}

func (n *guestNode) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	s := &guestDir{node: n}
	s.next, s.stop = iter.Pull2(n.volume.tree.ReadDir(n.tree.ctx, n.path))
	s.advance()
	if s.err != nil {
		s.stop()
		return nil, n.guestErrno(s.err)
	}
	return s, 0
}

// guestDir reads a directory, one entry ahead.
type guestDir struct {
	node  *guestNode
	next  func() (guestfs.DirEntry, error, bool)
	stop  func()
	entry guestfs.DirEntry
	err   error
	ok    bool
}

func (s *guestDir) advance() { s.entry, s.err, s.ok = s.next() }

// HasNext implements fs.DirStream.
func (s *guestDir) HasNext() bool { return s.ok }

// Next implements fs.DirStream.
func (s *guestDir) Next() (fuse.DirEntry, syscall.Errno) {
	if s.err != nil {
		s.ok = false
		return fuse.DirEntry{}, s.node.guestErrno(s.err)
	}
	e := s.entry
	if e.Err == nil {
		s.node.tree.seen.Add(guestPath{s.node.volume.id, s.node.below(e.Name)}, e.Attr)
	}
	s.advance()
	return fuse.DirEntry{Name: e.Name, Mode: e.Attr.Mode & syscall.S_IFMT, Ino: ino(s.node.volume.what(e.Attr)...)}, 0
}

// Close implements fs.DirStream.
func (s *guestDir) Close() { s.stop() }

func (n *guestNode) Readlink(context.Context) ([]byte, syscall.Errno) {
	to, err := n.volume.tree.Readlink(n.tree.ctx, n.path)
	if err != nil {
		return nil, n.guestErrno(err)
	}
	return []byte(to), 0
}

// Open lets the kernel keep what it read: the content never changes.
func (n *guestNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if errno := readOnly(flags); errno != 0 {
		return nil, 0, errno
	}
	f, err := n.volume.tree.Open(n.tree.ctx, n.path)
	if err != nil {
		return nil, 0, n.guestErrno(err)
	}
	return &guestHandle{n, f}, fuse.FOPEN_KEEP_CACHE, 0
}

// all reads the attributes once: the kernel asks for some with every ls.
func (n *guestNode) all() (map[string][]byte, syscall.Errno) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.xattrs == nil {
		x, err := n.volume.tree.Xattrs(n.tree.ctx, n.path)
		if err != nil {
			return nil, n.guestErrno(err)
		}
		n.xattrs = x
	}
	return n.xattrs, 0
}

func (n *guestNode) Getxattr(_ context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	x, errno := n.all()
	if errno != 0 {
		return 0, errno
	}
	v, ok := x[name]
	if !ok {
		return 0, syscall.ENODATA
	}
	return fill(dest, v)
}

func (n *guestNode) Listxattr(_ context.Context, dest []byte) (uint32, syscall.Errno) {
	x, errno := n.all()
	if errno != 0 {
		return 0, errno
	}
	var names []byte
	for name := range x {
		names = append(append(names, name...), 0)
	}
	return fill(dest, names)
}

// fill answers getxattr(2) and listxattr(2): no room at all asks for the size.
func fill(dest, v []byte) (uint32, syscall.Errno) {
	if len(dest) < len(v) {
		return uint32(len(v)), syscall.ERANGE
	}
	return uint32(copy(dest, v)), 0
}

// guestHandle is an open regular file.
type guestHandle struct {
	node *guestNode
	file guestfs.File
}

// Read implements fs.FileReader.
func (h *guestHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := h.file.ReadAtContext(h.node.tree.ctx, dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, h.node.guestErrno(err)
	}
	return fuse.ReadResultData(dest[:n]), 0
}

// Lseek finds data and holes.
func (h *guestHandle) Lseek(_ context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return 0, syscall.EINVAL
	}
	if off >= uint64(h.node.attr.Size) {
		return 0, syscall.ENXIO
	}
	at, err := h.file.Seek(h.node.tree.ctx, int64(off), whence == unix.SEEK_HOLE)
	if err != nil {
		return 0, h.node.guestErrno(err)
	}
	return uint64(at), 0
}
