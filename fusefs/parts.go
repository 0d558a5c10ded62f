package fusefs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/restore"
)

// partsDir holds the partitions of a disk. The table is read when somebody first looks.
type partsDir struct {
	node
	point *restore.PointDetails
	index int

	mu     sync.Mutex
	loaded bool
	parts  []guestfs.Partition
	table  []byte // what tableFile says
}

var (
	_ fs.NodeGetattrer = (*partsDir)(nil)
	_ fs.NodeLookuper  = (*partsDir)(nil)
	_ fs.NodeReaddirer = (*partsDir)(nil)
)

// tableFile says what the table says.
const tableFile = "partitions.json"

func partName(p guestfs.Partition) string { return fmt.Sprintf("p%d%s", p.Number, diskSuffix) }

func (d *partsDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	dirAttr(&out.Attr, d.point.Time)
	out.SetTimeout(forever)
	return 0
}

// load reads the table once. One that is damaged shows in tableFile, beside the partitions that could be
// made out.
func (d *partsDir) load() syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded {
		return 0
	}
	disk, closer, err := d.tree.catalog.Open(d.tree.ctx, d.point, d.index)
	if err != nil {
		return d.errno(err)
	}
	parts, err := guestfs.Partitions(d.tree.ctx, disk)
	_ = closer.Close() // it was only read
	if err != nil && !errors.Is(err, guestfs.ErrTable) {
		return d.errno(err)
	}
	doc := partitionTable{Partitions: []partitionInfo{}}
	if err != nil {
		doc.Error = err.Error()
		d.tree.failed(d.Path(nil), err)
	}
	for _, p := range parts {
		doc.Partitions = append(doc.Partitions, partitionInfo{File: partName(p), Number: p.Number, Name: p.Name, Type: p.Type, Offset: p.Off, Length: p.Len})
	}
	if d.table, err = json.MarshalIndent(doc, "", "  "); err != nil {
		return d.errno(err)
	}
	d.table = append(d.table, '\n')
	d.parts, d.loaded = parts, true
	return 0
}

// partitionTable is the content of tableFile.
type partitionTable struct {
	Error      string          `json:"error,omitempty"` // why there may be more partitions than are named
	Partitions []partitionInfo `json:"partitions"`
}

type partitionInfo struct {
	File   string `json:"file"`
	Number int    `json:"number"`
	Name   string `json:"name,omitempty"`
	Type   string `json:"type"`
	Offset int64  `json:"offset"` // bytes
	Length int64  `json:"length"` // bytes
}

func (d *partsDir) what(name string) []string {
	return []string{"part", d.point.VM, d.point.ID, d.point.Disks[d.index].Name, name}
}

func (d *partsDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := d.load(); errno != 0 {
		return nil, errno
	}
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	if name == tableFile {
		f := &textFile{node: node{tree: d.tree}, content: d.table, time: d.point.Time}
		f.attr(&out.Attr)
		return d.child(ctx, f, syscall.S_IFREG, d.what(name)...), 0
	}
	for i := range d.parts {
		if p := &d.parts[i]; partName(*p) == name {
			f := &diskFile{node: node{tree: d.tree}, point: d.point, index: d.index, part: p}
			f.attr(&out.Attr)
			return d.child(ctx, f, syscall.S_IFREG, d.what(name)...), 0
		}
	}
	return nil, syscall.ENOENT
}

func (d *partsDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	if errno := d.load(); errno != 0 {
		return nil, errno
	}
	entries := []fuse.DirEntry{{Name: tableFile, Mode: syscall.S_IFREG, Ino: ino(d.what(tableFile)...)}}
	for _, p := range d.parts {
		entries = append(entries, fuse.DirEntry{Name: partName(p), Mode: syscall.S_IFREG, Ino: ino(d.what(partName(p))...)})
	}
	return fs.NewListDirStream(entries), 0
}
