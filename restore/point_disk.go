package restore

import (
	"context"
	"fmt"
	"io"
	"iter"

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
}

var (
	_ Disk            = (*PointDisk)(nil)
	_ ReaderAtContext = (*PointDisk)(nil)
	_ io.Closer       = (*PointDisk)(nil)
)

// grainSource is what a disk needs of its repository and map.
type grainSource interface {
	Lookup(ctx context.Context, grain int64) (store.Ref, error)
	Runs(ctx context.Context, from, to int64) iter.Seq2[store.Run, error]
	ReadGrain(ctx context.Context, ref store.Ref, dst []byte) error
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

func (s repoSource) ReadGrain(ctx context.Context, ref store.Ref, dst []byte) error {
	return s.repo.ReadGrain(ctx, ref, dst)
}

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
	d := &PointDisk{src: src, root: root, name: name, cache: cache}
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
	grain := int64(d.root.Grain)
	for done := 0; done < total; {
		at := off + int64(done)
		piece := p[done:min(total, done+int(grain-at%grain))]
		if err := d.readGrain(ctx, at/grain, piece, at%grain); err != nil {
			start := at - at%grain
			return done, &ReadError{Disk: d.name, Off: start, Len: min(grain, d.root.Size-start), Err: err}
		}
		done += len(piece)
	}
	return total, eof
}

// readGrain fills p from byte off of a grain on.
func (d *PointDisk) readGrain(ctx context.Context, grain int64, p []byte, off int64) error {
	g, err := d.grain(ctx, grain)
	if err != nil {
		return err
	}
	if g == nil {
		clear(p)
		return nil
	}
	copy(p, g.data[off:])
	g.release()
	return nil
}

// grain returns a grain, to be released, or nil for zeroes.
func (d *PointDisk) grain(ctx context.Context, grain int64) (*cachedGrain, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ref, err := d.src.Lookup(ctx, grain)
	if err != nil || ref.IsZero() {
		return nil, err
	}
	return d.cache.get(ctx, grainKey{hash: ref.Hash, size: d.root.Grain}, func(ctx context.Context, dst []byte) error {
		return d.src.ReadGrain(ctx, ref, dst)
	})
}

func (d *PointDisk) prefetch(ctx context.Context, grain int64) {
	if g, err := d.grain(ctx, grain); err == nil && g != nil {
		g.release()
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
