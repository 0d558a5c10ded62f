package restore

import (
	"bytes"
	"context"
	"slices"
	"sync"

	"github.com/tidemark/tidemark/store"
)

// bulkDisk is a disk that can be copied past caches, and that can tell whether
// bytes are its own without reading them.
type bulkDisk interface {
	Disk

	// readBulk fills p, which begins at a grain and ends at one or at the end of the
	// disk.
	readBulk(ctx context.Context, p []byte, off int64) error

	// differences returns the runs in which have, which spans whole grains as
	// above, is not the disk's content, ascending.
	differences(ctx context.Context, have []byte, off int64) ([]Extent, error)
}

// bulk gives every disk what bulkDisk asks for.
func bulk(d Disk) bulkDisk {
	if b, ok := d.(bulkDisk); ok {
		return b
	}
	return plainBulk{d}
}

// plainBulk is a bulkDisk that reads in order to compare.
type plainBulk struct{ Disk }

func (b plainBulk) readBulk(ctx context.Context, p []byte, off int64) error {
	if n, err := readAtContext(ctx, b.Disk, p, off); n < len(p) {
		return noEOF(err)
	}
	return nil
}

func (b plainBulk) differences(ctx context.Context, have []byte, off int64) ([]Extent, error) {
	want := make([]byte, len(have))
	if err := b.readBulk(ctx, want, off); err != nil {
		return nil, err
	}
	var out []Extent
	const step = 64 << 10
	for at := 0; at < len(have); at += step {
		end := min(at+step, len(have))
		if !bytes.Equal(have[at:end], want[at:end]) {
			out = appendRun(out, Extent{Off: off + int64(at), Len: int64(end - at), Zero: store.IsZero(want[at:end])})
		}
	}
	return out, nil
}

// appendRun adds e, which lies behind all of runs.
func appendRun(runs []Extent, e Extent) []Extent {
	if n := len(runs); n > 0 && runs[n-1].Off+runs[n-1].Len == e.Off && runs[n-1].Zero == e.Zero {
		runs[n-1].Len += e.Len
		return runs
	}
	return append(runs, e)
}

var _ bulkDisk = (*PointDisk)(nil)

// span returns the grains that n bytes at off touch.
func (d *PointDisk) span(off, n int64) (from, to int64) {
	g := int64(d.root.Grain)
	return off / g, (off + n + g - 1) / g
}

func (d *PointDisk) readBulk(ctx context.Context, p []byte, off int64) error {
	from, to := d.span(off, int64(len(p)))
	refs := make([]store.Ref, to-from)
	if err := d.src.Refs(ctx, from, refs); err != nil {
		return d.readError(from, err)
	}
	dst := make([][]byte, len(refs))
	grain := d.root.Grain
	var last []byte // the whole of a grain that the disk ends in
	for i := range dst {
		if at := i * grain; at+grain <= len(p) {
			dst[i] = p[at : at+grain]
		} else {
			last = make([]byte, grain)
			dst[i] = last
		}
	}
	var mu sync.Mutex
	failed, first := len(refs), error(nil)
	d.src.ReadGrains(ctx, refs, dst, func(i int, err error) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil && i < failed {
			failed, first = i, err
		}
	})
	if first != nil {
		return d.readError(from+int64(failed), first)
	}
	if last != nil {
		copy(p[len(p)/grain*grain:], last)
	}
	return ctx.Err()
}

func (d *PointDisk) differences(ctx context.Context, have []byte, off int64) ([]Extent, error) {
	from, to := d.span(off, int64(len(have)))
	refs := make([]store.Ref, to-from)
	if err := d.src.Refs(ctx, from, refs); err != nil {
		return nil, d.readError(from, err)
	}
	var out []Extent
	grain := d.root.Grain
	for i, ref := range refs {
		part := have[i*grain : min((i+1)*grain, len(have))]
		whole := part
		if len(part) < grain {
			whole = append(slices.Clone(part), make([]byte, grain-len(part))...)
		}
		if !d.src.IsGrain(ref, whole) {
			out = appendRun(out, Extent{Off: off + int64(i*grain), Len: int64(len(part)), Zero: ref.IsZero()})
		}
	}
	return out, ctx.Err()
}
