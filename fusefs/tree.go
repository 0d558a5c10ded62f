package fusefs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/restore"
)

// forever is how long the kernel may keep what belongs to a point.
const forever = time.Hour

// tree is what all nodes of a mount share.
type tree struct {
	catalog *restore.Catalog
	refresh time.Duration
	failed  func(path string, err error)
	began   time.Time
	files   func(p *restore.PointDetails, disk int) guestfs.Files // nil: not shown
	seen    *lru.Cache[guestPath, guestfs.Attr]                   // by readers of directories, soon to be looked up

	// ctx ends with the mount. Requests do not use their own contexts: those end with any signal to
	// the reader (the Go runtime alone sends many), and the reader of a file
	// expects no EINTR.
	ctx    context.Context
	cancel context.CancelFunc

	root *rootDir
	vms  polled[[]string]
	gone *vanished

	mu       sync.Mutex
	listings map[string]*polled[listing] // by VM
	open     map[*openDisk]bool
	closed   bool
}

// seenEntries take about 300 bytes each.
const seenEntries = 32 << 10

func newTree(ctx context.Context, catalog *restore.Catalog, o Options) *tree {
	t := &tree{
		catalog:  catalog,
		refresh:  o.Refresh,
		failed:   o.Failed,
		files:    o.Files,
		began:    time.Now(),
		listings: map[string]*polled[listing]{},
		open:     map[*openDisk]bool{},
	}
	t.seen, _ = lru.New[guestPath, guestfs.Attr](seenEntries) // fails for no positive size
	if t.refresh <= 0 {
		t.refresh = time.Second
	}
	if t.failed == nil {
		t.failed = func(string, error) {}
	}
	t.ctx, t.cancel = context.WithCancel(ctx)
	t.root = &rootDir{node: node{tree: t}}
	t.gone = watchVanished(t.ctx, t.root)
	return t
}

// close ends all reads and closes disks that the kernel did not tell us to release.
func (t *tree) close() {
	t.cancel()
	t.gone.wait()
	t.mu.Lock()
	t.closed = true
	var left []*openDisk
	for d := range t.open {
		left = append(left, d)
	}
	clear(t.open)
	t.mu.Unlock()
	for _, d := range left {
		_ = d.closer.Close()
	}
}

// node is what all nodes have in common.
type node struct {
	fs.Inode
	tree *tree
}

// Statfs says that nothing is free: the tree cannot be written.
func (*node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	*out = fuse.StatfsOut{Bsize: 4096, Frsize: 4096, NameLen: 255}
	return 0
}

// errno tells of an error and turns it into what the caller gets.
func (n *node) errno(err error) syscall.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, restore.ErrNotFound):
		return syscall.ENOENT
	case n.tree.ctx.Err() != nil:
		return syscall.ENOTCONN
	}
	n.tree.failed(n.Path(nil), err)
	return syscall.EIO
}

// child makes a node below n, with an inode number made from what it is.
func (n *node) child(ctx context.Context, ops fs.InodeEmbedder, kind uint32, what ...string) *fs.Inode {
	return n.NewInode(ctx, ops, fs.StableAttr{Mode: kind, Ino: ino(what...)})
}

// ino makes inode numbers that are the same in each mount. They are taken from a
// cryptographic hash as two nodes of the same number would be one.
func ino(what ...string) uint64 {
	h := sha256.New()
	for _, w := range what {
		h.Write(append([]byte(w), 0))
	}
	// Upwards of 1<<63 go-fuse makes its own numbers, 0 and 1 have a meaning.
	return binary.BigEndian.Uint64(h.Sum(nil))>>1 | 2
}

// setTimes sets all times of a to at.
func setTimes(a *fuse.Attr, at time.Time) { a.SetTimes(&at, &at, &at) }

// us owns what is not a guest's file.
var us = fuse.Owner{Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}

// dirAttr describes a directory.
func dirAttr(a *fuse.Attr, at time.Time) {
	a.Mode = syscall.S_IFDIR | 0o555
	a.Owner = us
	a.Nlink = 2
	setTimes(a, at)
}

// fileAttr describes a file of size bytes.
func fileAttr(a *fuse.Attr, size int64, at time.Time) {
	a.Mode = syscall.S_IFREG | 0o444
	a.Owner = us
	a.Nlink = 1
	a.Size = uint64(size)
	a.Blocks = uint64(size+511) / 512
	setTimes(a, at)
}
