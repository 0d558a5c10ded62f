package guestfs

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"
)

// Files are the file systems of one disk, as the guest sees them: read-only, journals replayed.
// All methods are safe for concurrent use.
type Files interface {
	// Volumes says what is on the disk, in a stable order. An error means that it
	// can't be known; a disk with nothing on it has no volumes.
	Volumes(ctx context.Context) ([]Volume, error)

	// Tree is the tree of files of the volume of this name. If the volume can't be shown, the error is a
	// *VolumeError: there is never a tree with files missing instead.
	Tree(ctx context.Context, volume string) (Tree, error)
}

// Tree is one file system. A path has no leading slash, names are separated by '/', "" is the root, and
// symbolic links are not followed. Names may hold any bytes but '/' and NUL. A
// path that is not there gives an error that wraps os.ErrNotExist; other errors wrap a syscall.Errno where
// the guest's file system gave one.
type Tree interface {
	Lstat(ctx context.Context, path string) (Attr, error)

	// ReadDir yields a directory's entries without "." and "..", in the file system's order. After an error nothing follows.
	ReadDir(ctx context.Context, path string) iter.Seq2[DirEntry, error]

	// Open opens a regular file. It costs nothing until it is read.
	Open(ctx context.Context, path string) (File, error)

	Readlink(ctx context.Context, path string) (string, error)

	// Xattrs are all extended attributes with their values, of all namespaces: POSIX ACLs are
	// system.posix_acl_access and system.posix_acl_default.
	Xattrs(ctx context.Context, path string) (map[string][]byte, error)
}

// File is a regular file that is open. It needs no closing.
type File interface {
	io.ReaderAt
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)

	// Seek finds the next data (hole false) or hole (true) at or after off, as lseek(2) with SEEK_DATA and
	// SEEK_HOLE does; the error wraps syscall.ENXIO if there is none.
	Seek(ctx context.Context, off int64, hole bool) (int64, error)
}

// Attr is what lstat(2) says in the guest.
type Attr struct {
	Dev     uint64 // tells subvolumes of one volume apart
	Ino     uint64
	Mode    uint32 // S_IFMT and permissions, as in stat(2)
	Nlink   uint32
	UID     uint32
	GID     uint32
	Rdev    uint64 // of device nodes, in the encoding of makedev(3)
	Size    int64  // bytes
	Blocks  int64  // of 512 bytes
	Blksize uint32
	Atime   time.Time
	Mtime   time.Time
	Ctime   time.Time
}

// DirEntry is a directory's entry with the attributes of what it names.
type DirEntry struct {
	Name string
	Attr Attr
	Err  error // why Attr is not known, but for the type in Mode: a damaged inode
}

// States of a volume.
const (
	Clean    = "clean"          // was unmounted
	Dirty    = "needs-recovery" // was in use: the journal is replayed before it is read
	NoState  = ""               // the format doesn't say
	NotFiles = "no-files"       // no file system, or none that can be shown
)

// Volume is a part of a disk that may hold a file system.
type Volume struct {
	Name  string `json:"name"`            // "p1", "whole", "vg0-root"; fit for a file name
	Kind  string `json:"kind"`            // "ext4", "xfs", "luks", "swap", "unknown"; see Probe
	State string `json:"state,omitempty"` // Clean, ...
	Label string `json:"label,omitempty"`
	UUID  string `json:"uuid,omitempty"`
	Size  int64  `json:"size"`          // bytes
	Why   string `json:"why,omitempty"` // why there is no tree, if that is known without trying
}

// Why a volume can't be shown. A *VolumeError wraps one of them.
var (
	ErrNoVolume = errors.New("no such volume")
	ErrKey      = errors.New("needs a key")
	ErrNoFiles  = errors.New("no file system that is known")
	ErrMount    = errors.New("cannot be mounted")
	ErrLost     = errors.New("appliance has failed")
)

// VolumeError says why there is no tree.
type VolumeError struct {
	Volume string
	Err    error  // one of the above
	Reason string // the kernel's words, or the kind
}

func (e *VolumeError) Error() string {
	s := e.Volume + ": " + e.Err.Error()
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	return s
}

func (e *VolumeError) Unwrap() error { return e.Err }
