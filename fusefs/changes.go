package fusefs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tidemark/tidemark/restore"
)

// changes makes the file that says where the disks differ from the point before. When that one is deleted,
// another one is before: the kernel may not keep it for long.
func (d *pointDir) changes(ctx context.Context, p *restore.PointDetails, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	d.tree.short(out)
	l, err := d.tree.list(p.VM)
	if err != nil {
		return nil, d.errno(err)
	}
	since, _ := l.before(p.PointInfo)
	d.changed.Lock()
	defer d.changed.Unlock()
	if d.changed.text == nil || d.changed.since != since.PointInfo {
		text, err := d.tree.changesSince(p, since)
		if err != nil {
			return nil, d.errno(err)
		}
		d.changed.text, d.changed.since = text, since.PointInfo
	}
	return d.text(ctx, d.changed.text, &out.Attr, []string{"file", p.VM, p.ID, changesName, since.ID})
}

// The content of changesName. The extents cover at least all that differs; lengths and offsets are in bytes.
type (
	changesDoc struct {
		VM       string        `json:"vm"`
		ID       string        `json:"id"`
		Previous *previousDoc  `json:"previous"` // null: this is the first; all data is listed
		Disks    []diskChanges `json:"disks"`
	}
	previousDoc struct {
		ID   string `json:"id"`
		Name string `json:"name"` // of its directory
	}
	diskChanges struct {
		Name    string         `json:"name"`
		Size    int64          `json:"size"`
		Changed int64          `json:"changed"` // sum of the extents
		Merged  bool           `json:"merged"`  // they were too many: what lies between some of them is listed too
		Extents []changeExtent `json:"extents"`
	}
	changeExtent struct {
		Offset int64 `json:"offset"`
		Length int64 `json:"length"`
		Zero   bool  `json:"zero"` // true: all of it reads as zeroes now
	}
)

// maxChanges is how many extents of a disk are listed: some 6 MB of text.
const maxChanges = 1 << 16

func (t *tree) changesSince(p *restore.PointDetails, since namedPoint) ([]byte, error) {
	doc := changesDoc{VM: p.VM, ID: p.ID, Disks: []diskChanges{}}
	before := &restore.PointDetails{}
	if since.ID != "" {
		doc.Previous = &previousDoc{ID: since.ID, Name: since.name}
		var err error
		if before, err = t.catalog.Point(t.ctx, since.PointInfo); err != nil {
			return nil, fmt.Errorf("the point before, %s: %w", since.name, err)
		}
	}
	for i, disk := range p.Disks {
		j := slices.IndexFunc(before.Disks, func(o restore.DiskInfo) bool { return o.Name == disk.Name })
		extents, merged, err := t.diskChanges(p, i, before, j)
		if err != nil {
			return nil, err
		}
		c := diskChanges{Name: disk.Name, Size: disk.Size, Merged: merged, Extents: extents}
		for _, e := range extents {
			c.Changed += e.Length
		}
		doc.Disks = append(doc.Disks, c)
	}
	text, err := json.MarshalIndent(doc, "", "  ")
	return append(text, '\n'), err
}

// diskChanges lists where a disk differs from that of the point before, or from zeroes if j is negative.
func (t *tree) diskChanges(p *restore.PointDetails, i int, before *restore.PointDetails, j int) (_ []changeExtent, merged bool, err error) {
	d, closer, err := t.catalog.Open(t.ctx, p, i)
	if err != nil {
		return nil, false, err
	}
	defer func() { err = errors.Join(err, closer.Close()) }()
	if j < 0 {
		return collectChanges(dataOf(d.Extents(t.ctx, 0, d.Size())), maxChanges)
	}
	old, oldCloser, err := t.catalog.Open(t.ctx, before, j)
	if err != nil {
		return nil, false, err
	}
	defer func() { err = errors.Join(err, oldCloser.Close()) }()
	differ, ok := d.(restore.Differ)
	if !ok {
		return nil, false, restore.ErrIncomparable
	}
	return collectChanges(differ.Diff(t.ctx, old, 0, d.Size()), maxChanges)
}

// dataOf leaves out the zeroes.
func dataOf(extents iter.Seq2[restore.Extent, error]) iter.Seq2[restore.Change, error] {
	return func(yield func(restore.Change, error) bool) {
		for e, err := range extents {
			if (err != nil || !e.Zero) && !yield(restore.Change(e), err) {
				return
			}
		}
	}
}

// collectChanges joins neighbours of one kind. If more than limit (2 at least) are left, those closest to
// each other are joined with what lies between, until half as many are left.
func collectChanges(changes iter.Seq2[restore.Change, error], limit int) (list []changeExtent, merged bool, err error) {
	list = []changeExtent{}
	var gap int64 // how far from each other extents are that are joined, in bytes
	add := func(list []changeExtent, c changeExtent) []changeExtent {
		if n := len(list); n > 0 {
			last := &list[n-1]
			between := c.Offset - last.Offset - last.Length
			if between == 0 && last.Zero == c.Zero || merged && between <= gap {
				last.Zero = last.Zero && c.Zero && between == 0
				last.Length += between + c.Length
				return list
			}
		}
		return append(list, c)
	}
	for c, err := range changes {
		if err != nil {
			return nil, false, err
		}
		list = add(list, changeExtent{Offset: c.Off, Length: c.Len, Zero: c.Zero})
		if len(list) <= limit {
			continue
		}
		for merged = true; len(list) > limit/2; gap = max(4096, 2*gap) {
			joined := list[:0]
			for _, e := range list {
				joined = add(joined, e)
			}
			list = joined
		}
	}
	return list, merged, nil
}
