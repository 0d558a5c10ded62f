package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/store/blob"
)

// Bounds of the caches of one repository, in bytes.
const (
	nodeCacheBytes  = 64 << 20
	indexCacheBytes = 64 << 20
)

// reader gets checked records out of packs. Memory: two bounded caches, one
// buffer of a grain per concurrent call, and per call of readMany
// the ranges in flight. Safe for concurrent use.
type reader struct {
	blobs blob.Store
	repo  [16]byte
	keys  *keyring // nil: not encrypted
	ids   *hasher  // of grains, nodes and points
	codec *codec
	nodes *cache[Hash, *node] // by hash, which says what is in it wherever it lies
	packs *cache[PackID, *packIndex]
	moved generations
	bufs  *sync.Pool // *[]byte for stored records

	spans    *sync.Pool    // *[]byte for ranges of several records
	requests chan struct{} // one per range of a batch on its way
}

func newReader(b blob.Store, repo [16]byte, c *codec, keys *keyring) (*reader, error) {
	nodes, err := newCache[Hash, *node](nodeCacheBytes)
	if err != nil {
		return nil, err
	}
	packs, err := newCache[PackID, *packIndex](indexCacheBytes)
	if err != nil {
		return nil, err
	}
	ids := plainHasher
	if keys != nil {
		ids = keys.ids
	}
	return &reader{
		blobs: b, repo: repo, keys: keys, ids: ids, codec: c, nodes: nodes, packs: packs,
		bufs:     &sync.Pool{New: func() any { return new([]byte) }},
		spans:    &sync.Pool{New: func() any { return new([]byte) }},
		requests: make(chan struct{}, maxRequests),
	}, nil
}

// index returns the checked index of a pack.
func (r *reader) index(ctx context.Context, id PackID) (*packIndex, error) {
	return r.packs.get(ctx, id, func(ctx context.Context) (*packIndex, int64, error) {
		x, err := r.loadIndex(ctx, id)
		if err != nil {
			return nil, 0, err
		}
		return x, x.cost(), nil
	})
}

// indexTail is how many bytes of a pack's end are read at once. They hold the
// index of nearly every pack: those of grains have some 500 to 2000 records, those of
// nodes some 3600.
const indexTail = 192 << 10

// loadIndex reads and checks the index of a pack's newest generation. The error
// is a [CorruptError] if there is no object of the pack.
func (r *reader) loadIndex(ctx context.Context, id PackID) (*packIndex, error) {
	generation := r.moved.get(id)
	for move := 0; ; move++ {
		x, err := r.loadGeneration(ctx, id, generation)
		if !errors.Is(err, blob.ErrNotFound) {
			return x, err
		}
		newest, lerr := r.newestGeneration(ctx, id)
		if lerr != nil {
			return nil, lerr
		}
		r.moved.set(id, newest)
		// The same generation again: it was put back meanwhile, or a listing is late.
		if newest == 0 || move == maxMoves {
			return nil, missing(packObject(id, generation), err)
		}
		generation = newest
	}
}

// loadGeneration costs one round trip: the end of the object and its header are
// read at the same time. A large index costs a second one.
func (r *reader) loadGeneration(ctx context.Context, id PackID, generation uint32) (*packIndex, error) {
	name := packObject(id, generation)
	buf := r.buffer(indexTail)
	defer r.bufs.Put(buf)
	tail := *buf
	var header []byte
	var size int64
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		n, s, err := blob.ReadTail(gctx, r.blobs, name, tail)
		tail, size = tail[:n], s
		return wrapRead(name, err)
	})
	g.Go(func() (err error) {
		header, err = r.readHead(gctx, name)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if size < packHeaderLen+packFooterLen || size > maxPackLen+maxSealedIndex+packFooterLen {
		return nil, &CorruptError{name, fmt.Sprintf("%d bytes are no pack", size)}
	}
	footer := tail[len(tail)-packFooterLen:]
	f, err := parsePackFooter(footer, size, r.keys != nil)
	if err != nil {
		return nil, &CorruptError{name, err.Error()}
	}
	// A copy: the index is kept, the rest of the tail is not.
	entries := make([]byte, f.indexLen)
	if have := len(tail) - packFooterLen; len(entries) <= have {
		copy(entries, tail[have-len(entries):])
	} else if err := r.readFull(ctx, name, entries, f.indexOff); err != nil {
		return nil, err
	}
	var x *packIndex
	if r.keys == nil {
		x, err = parsePackIndex(header, entries, footer, size, id, r.repo)
	} else {
		n := packKeys(header)
		k, kerr := r.keys.set(ctx, r.blobs, n)
		if kerr != nil {
			return nil, fmt.Errorf("%s: %w", name, kerr)
		}
		if k == nil {
			return nil, r.keys.unknownSet(name, n)
		}
		x, err = openPackIndex(header, entries, footer, size, id, r.repo, k)
	}
	switch {
	case errors.Is(err, ErrVersion):
		return nil, fmt.Errorf("%s: %w", name, err)
	case err != nil:
		return nil, &CorruptError{name, err.Error()}
	}
	x.pack, x.generation, x.touches = id, generation, newTouches(f.indexOff)
	return x, nil
}

// readHead reads the header, and of a sealed pack as much as may belong to its capsule.
func (r *reader) readHead(ctx context.Context, name string) ([]byte, error) {
	p := make([]byte, packHeaderLen, packHeaderLen+capsuleLen)
	if r.keys == nil {
		return p, r.readFull(ctx, name, p, 0)
	}
	n, err := r.blobs.ReadAt(ctx, name, p[:cap(p)], 0)
	switch {
	case n < packHeaderLen && errors.Is(err, io.EOF):
		return nil, &CorruptError{name, fmt.Sprintf("%d bytes are no pack", n)}
	case n < cap(p) && !errors.Is(err, io.EOF):
		return nil, wrapRead(name, cmp.Or(err, io.ErrNoProgress))
	}
	return p[:n], nil
}

// readFull reads len(p) bytes. The error wraps blob.ErrNotFound if the object is
// gone, which may mean that the pack has moved.
func (r *reader) readFull(ctx context.Context, name string, p []byte, off int64) error {
	n, err := r.blobs.ReadAt(ctx, name, p, off)
	switch {
	case n == len(p):
		return nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &CorruptError{name, fmt.Sprintf("it ends after %d bytes of %d at offset %d", n, len(p), off)}
	case err == nil:
		return fmt.Errorf("%s: %w", name, io.ErrNoProgress)
	}
	return wrapRead(name, err)
}

func wrapRead(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

// locate returns the index entry that ref points to, and that it is the one
// meant. It may be outdated when it is used; [reader.record] cares for that.
func (r *reader) locate(ctx context.Context, ref Ref, kind packKind) (packEntry, error) {
	x, err := r.index(ctx, ref.Pack)
	if err != nil {
		return packEntry{}, err
	}
	return x.locate(ref, kind)
}

func (x *packIndex) locate(ref Ref, kind packKind) (packEntry, error) {
	e, ok := x.entry(ref.Ord)
	switch {
	case x.kind != kind:
		return e, x.recordError(ref, fmt.Sprintf("the pack holds %s records, not %s", x.kind, kind))
	case !ok:
		return e, x.recordError(ref, fmt.Sprintf("the pack has only %d", x.count()))
	case e.hash != ref.Hash:
		return e, x.recordError(ref, "it is another record: "+e.hash.String())
	case e.absent():
		return e, x.recordError(ref, "it was dropped as garbage when the pack was compacted")
	}
	return e, nil
}

// locateGrain is locate for a grain of so many bytes.
func (x *packIndex) locateGrain(ref Ref, grain int) (packEntry, error) {
	e, err := x.locate(ref, kindData)
	if err == nil && int(e.raw) != grain {
		err = x.recordError(ref, fmt.Sprintf("a grain of %d bytes, not %d", e.raw, grain))
	}
	return e, err
}

func (x *packIndex) recordError(ref Ref, what string) error {
	return &CorruptError{packObject(ref.Pack, x.generation), fmt.Sprintf("record %d: %s", ref.Ord, what)}
}

// record reads the record of ref, checked, into what dst returns for its raw
// length. After an error dst holds zeroes: nothing unchecked leaves.
func (r *reader) record(ctx context.Context, ref Ref, kind packKind, dst func(raw int) ([]byte, error)) error {
	return r.following(ctx, ref.Pack, func(x *packIndex) error {
		e, err := x.locate(ref, kind)
		if err != nil {
			return err
		}
		p, err := dst(int(e.raw))
		if err != nil {
			return x.recordError(ref, err.Error())
		}
		return r.readEntry(ctx, x, ref, e, p)
	})
}

// readEntry reads the record that e of x describes.
func (r *reader) readEntry(ctx context.Context, x *packIndex, ref Ref, e packEntry, dst []byte) error {
	if err := x.readable(ref); err != nil {
		clear(dst)
		return err
	}
	stored := dst
	if e.codec != codecRaw {
		buf := r.buffer(int(e.stored))
		defer r.bufs.Put(buf)
		stored = *buf
	}
	if err := r.readFull(ctx, packObject(ref.Pack, x.generation), stored, int64(e.off)); err != nil {
		clear(dst)
		return err
	}
	if x.kind == kindData {
		r.touched(ctx, x, e)
	}
	return r.decode(x, ref, e, stored, dst)
}

// buffer returns a buffer of n bytes, to be put back into bufs.
func (r *reader) buffer(n int) *[]byte {
	buf := r.bufs.Get().(*[]byte)
	if cap(*buf) < n {
		*buf = make([]byte, n)
	}
	*buf = (*buf)[:n]
	return buf
}

// decode turns the stored bytes of a record into its content, checked against
// ref. stored may be dst itself. After an error dst holds zeroes.
func (r *reader) decode(x *packIndex, ref Ref, e packEntry, stored, dst []byte) error {
	err := r.decodeUnchecked(x, ref, e, stored, dst)
	if err == nil && r.ids.sum(dst) != ref.Hash {
		err = x.recordError(ref, "the content does not match its hash")
	}
	if err != nil {
		clear(dst)
	}
	return err
}

func (r *reader) decodeUnchecked(x *packIndex, ref Ref, e packEntry, stored, dst []byte) error {
	if err := x.readable(ref); err != nil {
		return err
	}
	// The CRC sees damage that decompression would forgive.
	if castagnoli(stored) != e.crc {
		return x.recordError(ref, "the stored bytes do not match their checksum")
	}
	how := e.codec & codecCompression
	if x.seal != nil {
		to := dst[:0:len(dst)]
		if how != codecRaw {
			// Not in its place: the same bytes may be wanted for another dst.
			buf := r.buffer(len(stored))
			defer r.bufs.Put(buf)
			to = (*buf)[:0]
		}
		var err error
		if stored, err = x.unseal(to, stored, ref.Ord, &e); err != nil {
			return x.recordError(ref, err.Error())
		}
		if len(stored) == 0 || how == codecRaw && len(stored) != len(dst) {
			return x.recordError(ref, errWrongLength.Error())
		}
	}
	if how == codecRaw {
		if &stored[0] != &dst[0] {
			copy(dst, stored)
		}
		return nil
	}
	if err := r.codec.decompress(dst, stored, how); err != nil {
		return x.recordError(ref, err.Error())
	}
	return nil
}

// grain reads the grain of ref into dst.
func (r *reader) grain(ctx context.Context, ref Ref, dst []byte) error {
	if ref.IsZero() {
		clear(dst)
		return ctx.Err()
	}
	err := r.record(ctx, ref, kindData, grainLen(dst))
	if err != nil {
		clear(dst)
	}
	return err
}

// grainLen gives out dst if a grain has its length.
func grainLen(dst []byte) func(raw int) ([]byte, error) {
	return func(raw int) ([]byte, error) {
		if raw != len(dst) {
			return nil, fmt.Errorf("a grain of %d bytes, not %d", raw, len(dst))
		}
		return dst, nil
	}
}

// node returns the map node of ref, which must be of the level given.
func (r *reader) node(ctx context.Context, ref Ref, level uint8) (*node, error) {
	n, err := r.nodes.get(ctx, ref.Hash, func(ctx context.Context) (*node, int64, error) {
		n, err := r.loadNode(ctx, ref)
		if err != nil {
			return nil, 0, err
		}
		return n, n.cost(), nil
	})
	if err != nil {
		return nil, err
	}
	if n.level != level {
		return nil, recordError(ref, fmt.Sprintf("a map node of level %d, not %d", n.level, level))
	}
	return n, nil
}

func (r *reader) loadNode(ctx context.Context, ref Ref) (*node, error) {
	var p []byte
	err := r.record(ctx, ref, kindNode, func(raw int) ([]byte, error) {
		p = make([]byte, raw)
		return p, nil
	})
	if err != nil {
		return nil, err
	}
	return parseNode(ref, p)
}

// parseNode decodes the node of ref, whose hash was checked.
func parseNode(ref Ref, p []byte) (*node, error) {
	n, err := decodeNode(p)
	switch {
	case errors.Is(err, ErrVersion):
		return nil, fmt.Errorf("%s: record %d: %w", packName(ref.Pack), ref.Ord, err)
	case err != nil:
		return nil, recordError(ref, err.Error())
	}
	return n, nil
}

// recordError says that what a record holds is wrong, wherever it lies.
func recordError(ref Ref, what string) error {
	return &CorruptError{packName(ref.Pack), fmt.Sprintf("record %d: %s", ref.Ord, what)}
}
