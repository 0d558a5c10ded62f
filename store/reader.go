package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/tidemark/tidemark/store/blob"
)

// Bounds of the caches of one repository, in bytes.
const (
	nodeCacheBytes  = 64 << 20
	indexCacheBytes = 64 << 20
)

// reader gets checked records out of packs. Memory: two bounded caches and one
// buffer of a grain per concurrent call. Safe for concurrent use.
type reader struct {
	blobs blob.Store
	repo  [16]byte
	codec *codec
	nodes *cache[Hash, *node] // by hash, which says what is in it wherever it lies
	packs *cache[PackID, *packIndex]
	bufs  *sync.Pool // *[]byte for stored records
}

func newReader(b blob.Store, repo [16]byte, c *codec) (*reader, error) {
	nodes, err := newCache[Hash, *node](nodeCacheBytes)
	if err != nil {
		return nil, err
	}
	packs, err := newCache[PackID, *packIndex](indexCacheBytes)
	if err != nil {
		return nil, err
	}
	return &reader{
		blobs: b, repo: repo, codec: c, nodes: nodes, packs: packs,
		bufs: &sync.Pool{New: func() any { return new([]byte) }},
	}, nil
}

// index returns the checked index of a pack.
func (r *reader) index(ctx context.Context, id PackID) (*packIndex, error) {
	return r.packs.get(ctx, id, func(ctx context.Context) (*packIndex, int64, error) {
		x, err := r.loadIndex(ctx, id)
		if err != nil {
			return nil, 0, err
		}
		return x, int64(len(x.entries)) + 128, nil
	})
}

func (r *reader) loadIndex(ctx context.Context, id PackID) (*packIndex, error) {
	name := packName(id)
	info, err := r.blobs.Stat(ctx, name)
	if err != nil {
		return nil, missing(name, err)
	}
	if info.Size < packHeaderLen+packFooterLen || info.Size > maxPackLen+maxPackEntries*packEntryLen+packFooterLen {
		return nil, &CorruptError{name, fmt.Sprintf("%d bytes are no pack", info.Size)}
	}
	header := make([]byte, packHeaderLen)
	if err := r.readFull(ctx, name, header, 0); err != nil {
		return nil, err
	}
	// Most indexes fit into the first read of the end.
	tail := make([]byte, min(info.Size-packHeaderLen, 64<<10))
	if err := r.readFull(ctx, name, tail, info.Size-int64(len(tail))); err != nil {
		return nil, err
	}
	footer := tail[len(tail)-packFooterLen:]
	f, err := parsePackFooter(footer, info.Size)
	if err != nil {
		return nil, &CorruptError{name, err.Error()}
	}
	entries := make([]byte, f.count*packEntryLen)
	if have := len(tail) - packFooterLen; len(entries) <= have {
		copy(entries, tail[have-len(entries):])
	} else if err := r.readFull(ctx, name, entries, f.indexOff); err != nil {
		return nil, err
	}
	x, err := parsePackIndex(header, entries, footer, info.Size, id, r.repo)
	switch {
	case errors.Is(err, ErrVersion):
		return nil, fmt.Errorf("%s: %w", name, err)
	case err != nil:
		return nil, &CorruptError{name, err.Error()}
	}
	return x, nil
}

// missing turns the absence of an object that is referred to into corruption.
func missing(name string, err error) error {
	if errors.Is(err, blob.ErrNotFound) {
		return &CorruptError{name, "the object is missing"}
	}
	return fmt.Errorf("%s: %w", name, err)
}

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
	return missing(name, err)
}

// locate returns the index entry that ref points to, and that it is the one
// meant.
func (r *reader) locate(ctx context.Context, ref Ref, kind packKind) (packEntry, error) {
	x, err := r.index(ctx, ref.Pack)
	if err != nil {
		return packEntry{}, err
	}
	e, ok := x.entry(ref.Ord)
	switch {
	case x.kind != kind:
		return e, recordError(ref, fmt.Sprintf("the pack holds %s records, not %s", x.kind, kind))
	case !ok:
		return e, recordError(ref, fmt.Sprintf("the pack has only %d", x.count()))
	case e.hash != ref.Hash:
		return e, recordError(ref, "it is another record: "+e.hash.String())
	}
	return e, nil
}

func recordError(ref Ref, what string) error {
	return &CorruptError{packName(ref.Pack), fmt.Sprintf("record %d: %s", ref.Ord, what)}
}

// read fills dst with the record that e describes, checked against ref. After an
// error dst holds zeroes: nothing unchecked leaves.
func (r *reader) read(ctx context.Context, ref Ref, e packEntry, dst []byte) error {
	err := r.readUnchecked(ctx, ref, e, dst)
	if err == nil && sum(dst) != ref.Hash {
		err = recordError(ref, "the content does not match its hash")
	}
	if err != nil {
		clear(dst)
	}
	return err
}

func (r *reader) readUnchecked(ctx context.Context, ref Ref, e packEntry, dst []byte) error {
	stored := dst
	if e.codec != codecRaw {
		buf := r.bufs.Get().(*[]byte)
		defer r.bufs.Put(buf)
		if cap(*buf) < int(e.stored) {
			*buf = make([]byte, e.stored)
		}
		stored = (*buf)[:e.stored]
	}
	if err := r.readFull(ctx, packName(ref.Pack), stored, int64(e.off)); err != nil {
		return err
	}
	// The CRC sees damage that decompression would forgive.
	if castagnoli(stored) != e.crc {
		return recordError(ref, "the stored bytes do not match their checksum")
	}
	if e.codec == codecRaw {
		return nil
	}
	if err := r.codec.decompress(dst, stored, e.codec); err != nil {
		return recordError(ref, err.Error())
	}
	return nil
}

// grain reads the grain of ref into dst.
func (r *reader) grain(ctx context.Context, ref Ref, dst []byte) error {
	if ref.IsZero() {
		clear(dst)
		return ctx.Err()
	}
	e, err := r.locate(ctx, ref, kindData)
	if err != nil {
		return err
	}
	if int64(e.raw) != int64(len(dst)) {
		return recordError(ref, fmt.Sprintf("a grain of %d bytes, not %d", e.raw, len(dst)))
	}
	return r.read(ctx, ref, e, dst)
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
	e, err := r.locate(ctx, ref, kindNode)
	if err != nil {
		return nil, err
	}
	p := make([]byte, e.raw)
	if err := r.read(ctx, ref, e, p); err != nil {
		return nil, err
	}
	n, err := decodeNode(p)
	switch {
	case errors.Is(err, ErrVersion):
		return nil, fmt.Errorf("%s: record %d: %w", packName(ref.Pack), ref.Ord, err)
	case err != nil:
		return nil, recordError(ref, err.Error())
	}
	return n, nil
}
