package restore

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"

	"github.com/tidemark/tidemark/store"
)

// ErrCorrupt is wrapped by errors of reads that met damaged objects of the
// repository. It is the same as store.ErrCorrupt.
var ErrCorrupt = store.ErrCorrupt

// ReadError says which bytes of a disk could not be read. Others may be fine.
type ReadError struct {
	Disk     string // its name in the point
	Off, Len int64  // the grain that failed, in bytes
	Err      error  // why
}

func (e *ReadError) Error() string {
	return fmt.Sprintf("%s: bytes %d to %d: %v", e.Disk, e.Off, e.Off+e.Len-1, e.Err)
}

// Unwrap returns the cause.
func (e *ReadError) Unwrap() error { return e.Err }

// PointDisk is a disk of a restore point.
type PointDisk struct {
	src   grainSource
	root  store.Root
	name  string
	cache *Cache
	ahead *readAhead
	read  grainReader // of src
}

var (
	_ Disk            = (*PointDisk)(nil)
	_ ReaderAtContext = (*PointDisk)(nil)
	_ io.Closer       = (*PointDisk)(nil)
)

// grainSource is what a disk needs of its repository and map.
type grainSource interface {
	Refs(ctx context.Context, from int64, dst []store.Ref) error
	Runs(ctx context.Context, from, to int64) iter.Seq2[store.Run, error]
	ReadGrains(ctx context.Context, refs []store.Ref, dst [][]byte, done func(i int, err error))
	IsGrain(ref store.Ref, p []byte) bool
}

// Bounds of a grain's size, in bytes.
const (
	minGrain = 4 << 10
	maxGrain = 1 << 20
)

type repoSource struct {
	*store.Map
	repo *store.Repo
}

func (s repoSource) ReadGrains(ctx context.Context, refs []store.Ref, dst [][]byte, done func(i int, err error)) {
	s.repo.ReadGrains(ctx, refs, dst, done)
}

func (s repoSource) IsGrain(ref store.Ref, p []byte) bool { return s.repo.IsGrain(ref, p) }

// OpenPoint opens the disk of p with the given index. Disks may share a cache.
// The repository must stay open until the disk is closed.
func OpenPoint(repo *store.Repo, p *store.Point, disk int, cache *Cache) (*PointDisk, error) {
	if disk < 0 || disk >= len(p.Disks) {
		return nil, fmt.Errorf("disk %d of point %s of %s, which has %d: %w", disk, p.ID, p.VM, len(p.Disks), store.ErrNotFound)
	}
	d := p.Disks[disk]
	if g := d.Root.Grain; g < minGrain || g > maxGrain || g&(g-1) != 0 || d.Root.Size < 0 {
		return nil, fmt.Errorf("%s of point %s of %s: %d bytes in grains of %d: %w", d.Name, p.ID, p.VM, d.Root.Size, g, ErrCorrupt)
	}
	m, err := repo.Map(d.Root)
	if err != nil {
		return nil, fmt.Errorf("%s of point %s of %s: %w", d.Name, p.ID, p.VM, err)
	}
	return newPointDisk(repoSource{Map: m, repo: repo}, d.Root, d.Name, cache), nil
}

func newPointDisk(src grainSource, root store.Root, name string, cache *Cache) *PointDisk {
	d := &PointDisk{src: src, root: root, name: name, cache: cache, read: src.ReadGrains}
	d.ahead = newReadAhead(int64(root.Grain), d.grains(root.Size), cache.capacity, d.prefetch)
	return d
}

// grains is the number of grains that hold n bytes.
func (d *PointDisk) grains(n int64) int64 {
	g := int64(d.root.Grain)
	return n/g + min(n%g, 1)
}

// Close stops read-ahead and waits for it. All reads must have ended.
func (d *PointDisk) Close() error {
	d.ahead.close()
	return nil
}

// Size is the length of the disk in bytes.
func (d *PointDisk) Size() int64 { return d.root.Size }

// ReadAt implements io.ReaderAt. Every byte was checked against its hash. If
// one of the grains cannot be read, the error is a [ReadError], and the bytes before it count.
func (d *PointDisk) ReadAt(p []byte, off int64) (int, error) {
	return d.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext is ReadAt that ends when ctx is done.
func (d *PointDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	total, eof := readSpan(off, len(p), d.root.Size)
	if total > 0 {
		d.ahead.note(off, int64(total))
	}
	for done := 0; done < total; {
		at := off + int64(done)
		piece := p[done:min(total, done+int(readChunk-at%readChunk))]
		n, err := d.readChunk(ctx, piece, at)
		done += n
		if err != nil {
			return done, err
		}
	}
	return total, eof
}

// readChunk is how much of a disk is read at once, in bytes. It bounds what a large read
// holds beyond the cache, and is a multiple of every grain.
const readChunk = 4 << 20

// readChunk reads a part of a chunk.
func (d *PointDisk) readChunk(ctx context.Context, p []byte, off int64) (int, error) {
	grain := int64(d.root.Grain)
	first := off / grain
	asked := (off+int64(len(p))-1)/grain + 1
	to := d.ahead.claim(first, asked)
	l, err := d.enter(ctx, first, to)
	if err != nil && to > asked { // it may be the map of what was not asked for
		l, err = d.enter(ctx, first, asked)
	}
	if err != nil {
		return 0, d.readError(first, err)
	}
	defer l.release()
	done := 0
	for i := 0; done < len(p); i++ {
		at := off + int64(done)
		piece := p[done:min(len(p), done+int(grain-at%grain))]
		data, err := l.get(ctx, i)
		if err != nil {
			return done, d.readError(first+int64(i), err)
		}
		if data == nil {
			clear(piece)
		} else {
			copy(piece, data[at%grain:])
		}
		done += len(piece)
	}
	return done, nil
}

func (d *PointDisk) readError(grain int64, err error) error {
	off := grain * int64(d.root.Grain)
	return &ReadError{Disk: d.name, Off: off, Len: min(int64(d.root.Grain), d.root.Size-off), Err: err}
}

// lease is the use of neighbouring grains. It must be released.
type lease struct {
	disk   *PointDisk
	refs   []store.Ref
	grains []*cachedGrain // nil where zero
}

// leases are used again: most reads are of a grain that is cached, and need nothing
// else.
var leases = sync.Pool{New: func() any { return new(lease) }}

// enter begins the use of the grains [from, to), and loads those that are missing.
func (d *PointDisk) enter(ctx context.Context, from, to int64) (*lease, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	l := leases.Get().(*lease)
	n := int(to - from)
	l.disk, l.refs, l.grains = d, slices.Grow(l.refs[:0], n)[:n], slices.Grow(l.grains[:0], n)[:n]
	if err := d.src.Refs(ctx, from, l.refs); err != nil {
		leases.Put(l)
		return nil, err
	}
	d.cache.enter(ctx, l.refs, l.grains, d.root.Grain, d.read)
	return l, nil
}

// get returns the content of the i-th grain, or nil for zeroes.
func (l *lease) get(ctx context.Context, i int) ([]byte, error) {
	if l.grains[i] == nil {
		return nil, ctx.Err()
	}
	if err := l.disk.cache.wait(ctx, l.refs, l.grains, i, l.disk.read); err != nil {
		return nil, err
	}
	return l.grains[i].data, nil
}

func (l *lease) release() {
	l.disk.cache.release(l.grains)
	clear(l.grains)
	leases.Put(l)
}

// prefetch loads the grains [from, to). Who needs them will meet the errors.
func (d *PointDisk) prefetch(ctx context.Context, from, to int64) {
	if l, err := d.enter(ctx, from, to); err == nil {
		l.release()
	}
}

// Extents yields whole grains: a grain is zero if nothing is stored for it.
func (d *PointDisk) Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		from, to, err := extentSpan(off, n, d.root.Size)
		if err != nil {
			yield(Extent{}, err)
			return
		}
		if from == to {
			return
		}
		m := &extentMerger{yield: yield}
		if err := ctx.Err(); err != nil {
			m.fail(err)
			return
		}
		grain := int64(d.root.Grain)
		for r, err := range d.src.Runs(ctx, from/grain, d.grains(to)) {
			if err != nil {
				m.fail(fmt.Errorf("%s: map: %w", d.name, err))
				return
			}
			if !m.add(max(r.From*grain, from), min(r.To*grain, to), r.Zero) {
				return
			}
		}
		m.flush()
	}
}
