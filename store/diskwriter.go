package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"
)

// DiskOptions say which disk is written.
type DiskOptions struct {
	Name   string // "disk0", ...; rules as for [ValidVM]
	Source string // where it is read from, for the point's document
	Size   int64  // in bytes
	Grain  int    // in bytes; 0 means DefaultGrain

	// Dedup looks for each new grain in all packs of the repository. That reads all
	// their indexes and keeps 16 bytes per grain in memory. Without it a grain is
	// looked for at its own place in the parent and in this backup.
	Dedup bool

	// Resume goes on from a checkpoint: what is not written keeps the content that it had there. It must
	// be of the Writer's own [Writer.Unfinished], with the same grain and size.
	Resume *PartialDisk

	// Fresh begins with an empty map whatever the parent holds: for a parent that
	// is damaged.
	Fresh bool
}

// DiskWriter takes the content of one disk. Safe for concurrent use.
//
// Memory: per changed leaf (64 grains, 4 MiB of disk) about 120 bytes, and 52 bytes
// per changed grain while the leaf is not changed as a whole; whole
// leaves are moved to packs as they fill. So a sequential first backup needs some 30
// MiB per TiB, and scattered changes up to 172 bytes per grain changed.
type DiskWriter struct {
	w      *Writer
	opt    DiskOptions
	shape  Root // without Ref
	parent *Map // nil if the disk begins empty
	dedup  *dedupIndex
	lost   []Covered // of parent; see Lost

	changed, fresh, stored atomic.Int64 // bytes, for Stats

	edit   locker // guards leaves
	leaves map[int64]*leaf
	cutAt  int64 // the last grain of a disk that shrank, if it must be written since its old content can't be read; else -1
}

// leaf is what was written to one leaf node of the map.
type leaf struct {
	set     uint64 // grains in refs
	changed uint64 // grains that differ from the parent
	refs    []Ref  // of the grains set, ascending

	// A sealed leaf was written as a node: sealed is below set in place of the
	// parent's node. The zero Ref is a leaf of zeroes.
	isSealed bool
	sealed   Ref
}

// Disk adds a disk to the backup. It continues from the parent's disk of the same
// name if that has the same grain, cut or extended with zeroes if the size
// is another; else it begins as zeroes. Where it is cut within a grain and the repository's key can't
// read, the new last grain must be written: without it Commit's error wraps ErrWriterKey.
func (w *Writer) Disk(ctx context.Context, o DiskOptions) (*DiskWriter, error) {
	end, err := w.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	if o.Grain == 0 {
		o.Grain = DefaultGrain
	}
	if err := errors.Join(validDiskName(o.Name), validShape(o.Size, o.Grain)); err != nil {
		return nil, err
	}
	d := &DiskWriter{w: w, opt: o, edit: newLocker(), leaves: map[int64]*leaf{}, cutAt: -1}
	d.shape = Root{Size: o.Size, Grain: o.Grain}
	d.shape.Level = levelFor(d.shape.grains())
	if o.Dedup {
		if d.dedup, err = w.dedupIndex(ctx); err != nil {
			return nil, fmt.Errorf("index of all packs: %w", err)
		}
	}
	if err := d.continueParent(ctx); err != nil {
		return nil, fmt.Errorf("disk %s: %w", o.Name, err)
	}
	if err := d.findLost(ctx); err != nil {
		return nil, fmt.Errorf("disk %s: what is lost of it: %w", o.Name, err)
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	if w.disks[o.Name] != nil {
		return nil, fmt.Errorf("%w: disk %s is written already", ErrInvalid, o.Name)
	}
	w.disks[o.Name] = d
	return d, nil
}

func (w *Writer) dedupIndex(ctx context.Context) (*dedupIndex, error) {
	w.mu.Lock()
	full := w.full
	w.mu.Unlock()
	if full != nil {
		return full, nil
	}
	full, err := newDedupIndex(ctx, w.repo.reader, w.writing.condemned, w.lost)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.full = full
	return full, nil
}

// resume makes the disk continue from a checkpoint, and count from what it had counted.
func (d *DiskWriter) resume(p *PartialDisk) error {
	if p.Name != d.opt.Name || p.Root.Size != d.shape.Size || p.Root.Grain != d.shape.Grain {
		return fmt.Errorf("%w: the checkpoint is of disk %s, %d bytes, grains of %d", ErrInvalid, p.Name, p.Root.Size, p.Root.Grain)
	}
	m, err := d.w.repo.Map(p.Root)
	if err != nil {
		return err
	}
	d.parent = m
	d.changed.Store(p.Stats.Changed)
	d.fresh.Store(p.Stats.New)
	d.stored.Store(p.Stats.Stored)
	return nil
}

func (d *DiskWriter) continueParent(ctx context.Context) error {
	if d.opt.Resume != nil {
		return d.resume(d.opt.Resume)
	}
	if d.w.parent == nil || d.opt.Fresh {
		return nil
	}
	disks := d.w.parent.Disks
	i := slices.IndexFunc(disks, func(p Disk) bool { return p.Name == d.opt.Name })
	if i < 0 || disks[i].Root.Grain != d.opt.Grain {
		return nil
	}
	m, err := d.w.repo.Map(disks[i].Root)
	if err != nil {
		return err
	}
	d.parent = m
	if m.root.Size <= d.shape.Size {
		return nil
	}
	// The disk shrank. The way to the new last leaf is built anew, which cuts
	// what lies beyond; and the new last grain is zero beyond the end.
	last := d.shape.grains() - 1
	d.leaves[last>>fanOutBits] = &leaf{}
	tail := d.shape.Size % int64(d.opt.Grain)
	if tail == 0 {
		return nil
	}
	ref, err := m.Lookup(ctx, last)
	if err != nil {
		return err
	}
	if !ref.IsZero() && !d.w.repo.readable() {
		d.cutAt = last
		return nil
	}
	buf := make([]byte, d.opt.Grain)
	if err := d.w.repo.ReadGrain(ctx, ref, buf); err != nil {
		return err
	}
	clear(buf[tail:])
	return d.writeGrain(ctx, last, buf)
}

// HasParent tells whether what is not written keeps the parent's content. Else it
// is zeroes.
func (d *DiskWriter) HasParent() bool { return d.parent != nil }

// Stats returns the costs so far, without Read. Changed compares the present state with
// the parent's: a grain that is written again, or back, is not counted twice.
// Stored grows once more in Commit, by the upper nodes of the map.
func (d *DiskWriter) Stats() Stats {
	return Stats{Changed: d.changed.Load(), New: d.fresh.Load(), Stored: d.stored.Load()}
}

// Write replaces the content at off by p, which is not kept. off is a multiple of
// the grain, and so is len(p), unless p reaches exactly to the end of the disk.
// Hashing and compression run here, in the caller's goroutine. Concurrent calls
// must not overlap. The error wraps ErrInvalid if the range is wrong;
// once a pack could not be put, every call returns that error.
func (d *DiskWriter) Write(ctx context.Context, off int64, p []byte) error {
	end, err := d.w.begin()
	if err != nil {
		return err
	}
	defer end()
	if err := d.w.data.failed(); err != nil {
		return err
	}
	g := int64(d.opt.Grain)
	if err := d.validRange(off, int64(len(p))); err != nil {
		return err
	}
	for n := off / g; len(p) > 0; n++ {
		b := p[:min(g, int64(len(p)))]
		p = p[len(b):]
		if int64(len(b)) < g { // the tail of the disk
			b = append(make([]byte, 0, g), b...)[:g]
		}
		if err := d.writeGrain(ctx, n, b); err != nil {
			return d.failed(n, err)
		}
	}
	return nil
}

// validRange tells whether n bytes at off are whole grains of the disk.
func (d *DiskWriter) validRange(off, n int64) error {
	g := int64(d.opt.Grain)
	if off < 0 || off%g != 0 || n > d.shape.Size || off > d.shape.Size-n || n%g != 0 && off+n != d.shape.Size {
		return fmt.Errorf("%w: write of [%d, %d) to a disk of %d bytes with grains of %d", ErrInvalid, off, off+n, d.shape.Size, g)
	}
	return nil
}

func (d *DiskWriter) failed(grain int64, err error) error {
	return fmt.Errorf("write grain %d of disk %s: %w", grain, d.opt.Name, err)
}

// writeGrain sets one whole grain.
func (d *DiskWriter) writeGrain(ctx context.Context, n int64, b []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var was Ref
	known := true
	if d.isLost(n) {
		known = false // as its hash may be the same
	} else if d.parent != nil && n < d.parent.Grains() {
		var err error
		was, err = d.parent.Lookup(ctx, n)
		switch {
		case errors.Is(err, ErrCorrupt):
			known = false // write it anew: that heals
		case err != nil:
			return err
		}
	}
	var now Ref
	if !IsZero(b) {
		now.Hash = d.w.repo.ids.sum(b)
		if known && now.Hash == was.Hash {
			now = was
		} else {
			var err error
			if now, err = d.storeGrain(ctx, now.Hash, b); err != nil {
				return err
			}
		}
	}
	return d.set(ctx, n, now, !known || now.Hash != was.Hash)
}

// IsZero tells whether p is all zeroes, as an empty one is: it is if it begins so and equals itself shifted.
func IsZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

// storeGrain returns the place of content that the parent does not hold there.
func (d *DiskWriter) storeGrain(ctx context.Context, h Hash, b []byte) (Ref, error) {
	return d.place(ctx, h, func() (Ref, int64, error) { return d.w.addRecord(ctx, d.w.data, h, b) })
}

// place returns the place of the grain h, by add if this Writer and its index don't know one. add also returns
// what the grain costs, in bytes.
func (d *DiskWriter) place(ctx context.Context, h Hash, add func() (Ref, int64, error)) (Ref, error) {
	return d.w.session.once(ctx, h, func() (Ref, error) {
		if d.dedup != nil {
			if ref, ok, err := d.dedup.find(ctx, h); ok || err != nil {
				return ref, err
			}
		}
		ref, cost, err := add()
		if err != nil {
			return Ref{}, err
		}
		d.fresh.Add(int64(d.opt.Grain))
		d.stored.Add(cost)
		return ref, nil
	})
}

// addRecord compresses a record and adds it to a pack.
func (w *Writer) addRecord(ctx context.Context, to *packWriter, h Hash, raw []byte) (Ref, int64, error) {
	buf := w.repo.bufs.Get().(*[]byte)
	defer w.repo.bufs.Put(buf)
	stored, how, err := w.repo.codec.compress(buf, raw)
	if err != nil {
		return Ref{}, 0, err
	}
	return to.add(ctx, stored, len(raw), how, h)
}

// grainLen is the part of grain n that lies on the disk, in bytes.
func (d *DiskWriter) grainLen(n int64) int64 {
	return min(int64(d.opt.Grain), d.shape.Size-n*int64(d.opt.Grain))
}

// validMask has a bit for each grain of leaf i that lies on the disk.
func (d *DiskWriter) validMask(i int64) uint64 {
	if n := d.shape.grains() - i<<fanOutBits; n < fanOut {
		return 1<<n - 1
	}
	return ^uint64(0)
}

// set enters a grain into its leaf.
func (d *DiskWriter) set(ctx context.Context, n int64, ref Ref, changed bool) error {
	if err := d.edit.lock(ctx); err != nil {
		return err
	}
	defer d.edit.unlock()
	i, bit := n>>fanOutBits, uint64(1)<<(n&(fanOut-1))
	l := d.leaves[i]
	if l == nil {
		if !changed {
			return nil // the parent's leaf says it already
		}
		l = &leaf{}
		d.leaves[i] = l
	}
	if changed != (l.changed&bit != 0) {
		l.changed ^= bit
		if changed {
			d.changed.Add(d.grainLen(n))
		} else {
			d.changed.Add(-d.grainLen(n))
		}
	}
	at := bits.OnesCount64(l.set & (bit - 1))
	if l.set&bit != 0 {
		l.refs[at] = ref
	} else {
		l.refs = slices.Insert(l.refs, at, ref)
		l.set |= bit
	}
	if l.set == d.validMask(i) {
		return d.seal(ctx, l)
	}
	return nil
}

// seal moves a leaf whose every grain is known out of memory. The caller holds
// edit.
func (d *DiskWriter) seal(ctx context.Context, l *leaf) error {
	var children [fanOut]Ref
	copy(children[:], l.refs) // all of them are set, so they lie in order
	ref, err := d.putNode(ctx, 0, &children, Ref{})
	if err != nil {
		return err
	}
	l.isSealed, l.sealed = true, ref
	l.set, l.refs = 0, nil
	return nil
}

// putNode stores a map node, or nothing if it is all zeroes or equal to same.
func (d *DiskWriter) putNode(ctx context.Context, level int, children *[fanOut]Ref, same Ref) (Ref, error) {
	if *children == ([fanOut]Ref{}) {
		return Ref{}, nil
	}
	p := encodeNode(uint8(level), children)
	h := d.w.repo.ids.sum(p)
	if h == same.Hash {
		return same, nil
	}
	ref, cost, err := d.w.addRecord(ctx, d.w.nodes, h, p)
	if err != nil {
		return Ref{}, err
	}
	d.stored.Add(cost)
	return ref, nil
}
