package fusefs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/restore"
)

const (
	filesSuffix = ".files"
	readmeFile  = "README.txt"
)

var (
	_ fs.NodeGetattrer = (*filesDir)(nil)
	_ fs.NodeLookuper  = (*filesDir)(nil)
	_ fs.NodeReaddirer = (*filesDir)(nil)
)

// filesDir holds the volumes of a disk.
type filesDir struct {
	node
	point *restore.PointDetails
	index int
	files guestfs.Files
}

// filesOf is the node of a name such as disk0.files, if the mount shows files.
func (d *pointDir) filesOf(ctx context.Context, p *restore.PointDetails, name string, out *fuse.EntryOut) *fs.Inode {
	disk, ok := strings.CutSuffix(name, filesSuffix)
	i := slices.IndexFunc(p.Disks, func(d restore.DiskInfo) bool { return d.Name == disk })
	if !ok || i < 0 || d.tree.files == nil {
		return nil
	}
	dirAttr(&out.Attr, p.Time)
	f := &filesDir{node: node{tree: d.tree}, point: p, index: i, files: d.tree.files(p, i)}
	return d.child(ctx, f, syscall.S_IFDIR, "files", p.VM, p.ID, name)
}

func (d *filesDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	dirAttr(&out.Attr, d.point.Time)
	out.SetTimeout(forever)
	return 0
}

func (d *filesDir) what(name string) []string {
	return []string{"volume", d.point.VM, d.point.ID, d.point.Disks[d.index].Name, name}
}

func (d *filesDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	volumes, err := d.files.Volumes(d.tree.ctx)
	if err != nil {
		return nil, d.guestErrno(err)
	}
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	if name == readmeFile {
		f := &textFile{node: node{tree: d.tree}, content: d.readme(volumes), time: d.point.Time}
		f.attr(&out.Attr)
		out.SetEntryTimeout(d.tree.refresh) // an appliance that failed may be started again
		return d.NewInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG}), 0
	}
	if !slices.ContainsFunc(volumes, func(v guestfs.Volume) bool { return v.Name == name }) {
		return nil, syscall.ENOENT
	}
	v := &guestVolume{name: name, id: strings.Join(d.what(name), "\x00")}
	n := &guestNode{node: node{tree: d.tree}, volume: v}
	v.tree, err = d.files.Tree(d.tree.ctx, name)
	if err == nil {
		n.attr, err = v.tree.Lstat(d.tree.ctx, "")
	}
	var why *guestfs.VolumeError
	switch {
	case errors.As(err, &why):
		// It has its place, and says why when it is opened.
		f := &failedVolume{node: node{tree: d.tree}, err: err, point: d.point}
		dirAttr(&out.Attr, d.point.Time)
		return d.child(ctx, f, syscall.S_IFDIR, append(d.what(name), "failed")...), 0
	case err != nil:
		return nil, d.guestErrno(err)
	}
	guestAttr(&out.Attr, n.attr)
	return d.child(ctx, n, syscall.S_IFDIR, v.what(n.attr)...), 0
}

func (d *filesDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	volumes, err := d.files.Volumes(d.tree.ctx)
	if err != nil {
		return nil, d.guestErrno(err)
	}
	entries := []fuse.DirEntry{{Name: readmeFile, Mode: syscall.S_IFREG}}
	for _, v := range volumes {
		entries = append(entries, fuse.DirEntry{Name: v.Name, Mode: syscall.S_IFDIR, Ino: ino(d.what(v.Name)...)})
	}
	return fs.NewListDirStream(entries), 0
}

// readme says what is on the disk, and why some of it can't be shown.
func (d *filesDir) readme(volumes []guestfs.Volume) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "Files of %s of %s at %s, as the guest sees them.\n\n", d.point.Disks[d.index].Name, d.point.VM, d.point.Time.UTC().Format(nameTime))
	if len(volumes) == 0 {
		b.WriteString("Nothing was found on it.\n")
	}
	for _, v := range volumes {
		fmt.Fprintf(&b, "%s: %s", v.Name, v.Kind)
		if v.Label != "" {
			fmt.Fprintf(&b, " %q", v.Label)
		}
		fmt.Fprintf(&b, ", %d bytes", v.Size)
		if v.State == guestfs.Dirty {
			b.WriteString(", was in use: read after its recovery")
		}
		if _, err := d.files.Tree(d.tree.ctx, v.Name); err != nil {
			fmt.Fprintf(&b, "\n    not shown: %v", err)
		}
		b.WriteString("\n")
	}
	return []byte(b.String())
}

// failedVolume is a volume that can't be shown: not an empty tree, but an error.
type failedVolume struct {
	node
	err   error
	point *restore.PointDetails
}

var (
	_ fs.NodeGetattrer = (*failedVolume)(nil)
	_ fs.NodeOpendirer = (*failedVolume)(nil)
	_ fs.NodeLookuper  = (*failedVolume)(nil)
)

func (f *failedVolume) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	dirAttr(&out.Attr, f.point.Time)
	return 0
}

func (f *failedVolume) Opendir(context.Context) syscall.Errno { return f.guestErrno(f.err) }

func (f *failedVolume) Lookup(context.Context, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, f.guestErrno(f.err)
}

// guestErrno turns an error of a guest's files into what the caller gets.
func (n *node) guestErrno(err error) syscall.Errno {
	var errno syscall.Errno
	switch {
	case n.tree.ctx.Err() != nil:
		return syscall.ENOTCONN
	case errors.Is(err, guestfs.ErrNoVolume):
		return syscall.ENOENT
	case errors.Is(err, guestfs.ErrKey):
		n.tree.failed(n.Path(nil), err)
		return syscall.ENOKEY
	case errors.Is(err, guestfs.ErrNoFiles):
		n.tree.failed(n.Path(nil), err)
		return syscall.EMEDIUMTYPE
	case errors.Is(err, guestfs.ErrLost) || errors.Is(err, guestfs.ErrMount):
	case errors.As(err, &errno):
		if errno == syscall.EIO || errno == syscall.EUCLEAN {
			n.tree.failed(n.Path(nil), err)
		}
		return errno
	}
	n.tree.failed(n.Path(nil), err)
	return syscall.EIO
}
