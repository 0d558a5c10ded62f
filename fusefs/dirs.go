package fusefs

import (
	"context"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tidemark/tidemark/restore"
)

var (
	_ fs.NodeGetattrer = (*rootDir)(nil)
	_ fs.NodeLookuper  = (*rootDir)(nil)
	_ fs.NodeReaddirer = (*rootDir)(nil)
	_ fs.NodeStatfser  = (*rootDir)(nil)

	_ fs.NodeGetattrer = (*vmDir)(nil)
	_ fs.NodeLookuper  = (*vmDir)(nil)
	_ fs.NodeReaddirer = (*vmDir)(nil)

	_ fs.NodeGetattrer  = (*latestLink)(nil)
	_ fs.NodeReadlinker = (*latestLink)(nil)

	_ fs.NodeGetattrer = (*pointDir)(nil)
	_ fs.NodeLookuper  = (*pointDir)(nil)
	_ fs.NodeReaddirer = (*pointDir)(nil)
)

// rootDir holds the VMs.
type rootDir struct{ node }

func (d *rootDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	dirAttr(&out.Attr, d.tree.began)
	out.SetTimeout(forever)
	return 0
}

func (d *rootDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	vms, err := d.tree.vmNames()
	if err != nil {
		return nil, d.errno(err)
	}
	if !slices.Contains(vms, name) {
		return nil, syscall.ENOENT
	}
	vm := &vmDir{node: node{tree: d.tree}, vm: name}
	if errno := vm.attr(&out.Attr); errno != 0 {
		return nil, errno
	}
	d.tree.short(out)
	return d.child(ctx, vm, syscall.S_IFDIR, "vm", name), 0
}

func (d *rootDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	vms, err := d.tree.vmNames()
	if err != nil {
		return nil, d.errno(err)
	}
	var entries []fuse.DirEntry
	for _, vm := range vms {
		entries = append(entries, fuse.DirEntry{Name: vm, Mode: syscall.S_IFDIR, Ino: ino("vm", vm)})
	}
	return fs.NewListDirStream(entries), 0
}

// short has the kernel ask again soon: what the entry names may change.
func (t *tree) short(out *fuse.EntryOut) {
	out.SetEntryTimeout(t.refresh)
	out.SetAttrTimeout(t.refresh)
}

// vmDir holds the points of a VM.
type vmDir struct {
	node
	vm string
}

const latest = "latest"

func (d *vmDir) attr(a *fuse.Attr) syscall.Errno {
	l, err := d.tree.list(d.vm)
	if err != nil {
		return d.errno(err)
	}
	at := d.tree.began
	if p, ok := l.newest(); ok {
		at = p.Time
	}
	dirAttr(a, at)
	return 0
}

func (d *vmDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.SetTimeout(d.tree.refresh)
	return d.attr(&out.Attr)
}

func (d *vmDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	l, err := d.tree.list(d.vm)
	if err != nil {
		return nil, d.errno(err)
	}
	d.tree.short(out)
	if name == latest {
		p, ok := l.newest()
		if !ok {
			return nil, syscall.ENOENT
		}
		linkAttr(&out.Attr, p)
		return d.child(ctx, &latestLink{node: node{tree: d.tree}, vm: d.vm}, syscall.S_IFLNK, "latest", d.vm), 0
	}
	p, ok := l.find(name)
	if !ok {
		return nil, syscall.ENOENT
	}
	dirAttr(&out.Attr, p.Time)
	out.SetAttrTimeout(forever)
	dir := &pointDir{node: node{tree: d.tree}, point: p.PointInfo}
	return d.child(ctx, dir, syscall.S_IFDIR, "point", p.VM, p.ID), 0
}

func (d *vmDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	l, err := d.tree.list(d.vm)
	if err != nil {
		return nil, d.errno(err)
	}
	var entries []fuse.DirEntry
	for _, p := range l.points {
		entries = append(entries, fuse.DirEntry{Name: p.name, Mode: syscall.S_IFDIR, Ino: ino("point", p.VM, p.ID)})
	}
	if _, ok := l.newest(); ok {
		entries = append(entries, fuse.DirEntry{Name: latest, Mode: syscall.S_IFLNK, Ino: ino("latest", d.vm)})
	}
	return fs.NewListDirStream(entries), 0
}

// latestLink leads to the newest point of a VM.
type latestLink struct {
	node
	vm string
}

func linkAttr(a *fuse.Attr, to namedPoint) {
	a.Mode = syscall.S_IFLNK | 0o777
	a.Owner = us
	a.Nlink = 1
	a.Size = uint64(len(to.name))
	setTimes(a, to.Time)
}

func (l *latestLink) target() (namedPoint, syscall.Errno) {
	points, err := l.tree.list(l.vm)
	if err != nil {
		return namedPoint{}, l.errno(err)
	}
	p, ok := points.newest()
	if !ok {
		return namedPoint{}, syscall.ENOENT
	}
	return p, 0
}

func (l *latestLink) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	p, errno := l.target()
	linkAttr(&out.Attr, p)
	out.SetTimeout(l.tree.refresh)
	return errno
}

func (l *latestLink) Readlink(context.Context) ([]byte, syscall.Errno) {
	p, errno := l.target()
	return []byte(p.name), errno
}

// pointDir holds the files of a point.
type pointDir struct {
	node
	point restore.PointInfo

	mu      sync.Mutex
	details *restore.PointDetails // read when first needed

	changed struct {
		sync.Mutex
		since restore.PointInfo // the point before, when text was made; none: its zero
		text  []byte
	}
}

const (
	documentFile = "point.json"
	configFile   = "vm.json"
	changesName  = "changes-since-previous.json"
	diskSuffix   = ".raw"
	partsSuffix  = ".parts"
)

func (d *pointDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	dirAttr(&out.Attr, d.point.Time)
	out.SetTimeout(forever)
	return 0
}

func (d *pointDir) load() (*restore.PointDetails, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.details == nil {
		p, err := d.tree.catalog.Point(d.tree.ctx, d.point)
		if err != nil {
			return nil, d.errno(err)
		}
		d.details = p
	}
	return d.details, 0
}

// fits tells whether a name can be one of a directory's entries: the repository may be
// someone else's.
func fits(name string) bool {
	return len(name) <= 255 && !strings.ContainsAny(name, "/\x00")
}

func (d *pointDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	p, errno := d.load()
	if errno != 0 {
		return nil, errno
	}
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	what := []string{"file", p.VM, p.ID, name}
	switch {
	case name == documentFile:
		return d.text(ctx, p.Document, &out.Attr, what)
	case name == configFile && len(p.Config) > 0:
		return d.text(ctx, p.Config, &out.Attr, what)
	case name == changesName:
		return d.changes(ctx, p, out)
	}
	if child := d.filesOf(ctx, p, name, out); child != nil {
		return child, 0
	}
	for i, disk := range p.Disks {
		switch name {
		case disk.Name + diskSuffix:
			f := &diskFile{node: node{tree: d.tree}, point: p, index: i}
			f.attr(&out.Attr)
			return d.child(ctx, f, syscall.S_IFREG, what...), 0
		case disk.Name + partsSuffix:
			dirAttr(&out.Attr, d.point.Time)
			return d.child(ctx, &partsDir{node: node{tree: d.tree}, point: p, index: i}, syscall.S_IFDIR, what...), 0
		}
	}
	return nil, syscall.ENOENT
}

func (d *pointDir) text(ctx context.Context, content []byte, a *fuse.Attr, what []string) (*fs.Inode, syscall.Errno) {
	f := &textFile{node: node{tree: d.tree}, content: content, time: d.point.Time}
	f.attr(a)
	return d.child(ctx, f, syscall.S_IFREG, what...), 0
}

func (d *pointDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	p, errno := d.load()
	if errno != 0 {
		return nil, errno
	}
	var entries []fuse.DirEntry
	add := func(name string, mode uint32) {
		if fits(name) {
			entries = append(entries, fuse.DirEntry{Name: name, Mode: mode, Ino: ino("file", p.VM, p.ID, name)})
		}
	}
	for _, disk := range p.Disks {
		add(disk.Name+diskSuffix, syscall.S_IFREG)
		add(disk.Name+partsSuffix, syscall.S_IFDIR)
		if d.tree.files != nil {
			add(disk.Name+filesSuffix, syscall.S_IFDIR)
		}
	}
	add(changesName, syscall.S_IFREG)
	add(documentFile, syscall.S_IFREG)
	if len(p.Config) > 0 {
		add(configFile, syscall.S_IFREG)
	}
	return fs.NewListDirStream(entries), 0
}
