package store

import (
	"context"
	"errors"
)

// mending makes the next generation of a pack.
type mending struct {
	c       *repairing
	id      PackID
	base    generation // x is nil if there is none with a whole index
	wounds  map[uint32]*wound
	kind    packKind          // of content
	content map[uint32][]byte // of records that are healed, or carried over
}

// carry takes over what is in other generations and not in base, so that they can go. It returns false if
// something can't be: then nothing of the pack is changed.
func (b *mending) carry(ctx context.Context, all []generation) (bool, error) {
	for _, g := range all {
		if g.x == nil || g.x == b.base.x || g.x.kind != b.base.x.kind {
			continue
		}
		for ord := range uint32(g.x.count()) {
			e, _ := g.x.entry(ord)
			if have, ok := b.base.x.entry(ord); b.content[ord] != nil || e.absent() || ok && !have.absent() {
				continue
			}
			raw, err := b.c.read(ctx, g.x, ord, e.hash, g.x.kind)
			if errors.Is(err, ErrCorrupt) {
				continue
			}
			if err != nil {
				return false, err
			}
			w := &wound{hash: e.hash, kind: g.x.kind, raw: e.raw}
			if !b.takes(ord, w, raw) {
				return false, nil
			}
			b.wounds[ord], b.content[ord], b.kind = w, raw, w.kind
		}
	}
	return true, nil
}

// anew tells whether the pack is sealed under a new key, with all that is in it. An ordinal of a key may be
// sealed once only, and grains needn't compress as they did.
func (b *mending) anew() bool {
	return b.c.r.keys != nil && (b.base.x == nil || b.base.x.kind == kindData)
}

// takes tells whether a record can be put in its place. The key of a sealed pack of nodes can't change, so
// that only the very bytes may be sealed that were.
func (b *mending) takes(ord uint32, w *wound, raw []byte) bool {
	x := b.base.x
	if ord >= maxPackEntries || len(b.content) > 0 && w.kind != b.kind {
		return false
	}
	if x != nil {
		// Only in the place that the index gives to this hash, or to none.
		e, ok := x.entry(ord)
		if !ok || w.kind != x.kind || e.hash != w.hash && (!e.absent() || e.hash != Hash{}) {
			return false
		}
	}
	if b.c.r.keys == nil || w.kind == kindData {
		return true
	}
	_, err := b.sameSealed(ord, raw)
	return err == nil
}

var errSealedOnce = errors.New("it was sealed in another form, and a place is sealed once only")

// sameSealed seals a node if that gives what the index says was sealed.
func (b *mending) sameSealed(ord uint32, raw []byte) ([]byte, error) {
	x := b.base.x
	if x == nil {
		return nil, errSealedOnce
	}
	e, ok := x.entry(ord)
	if !ok || e.absent() {
		return nil, errSealedOnce
	}
	stored, how, err := b.c.r.codec.compress(new([]byte), raw)
	if err != nil {
		return nil, err
	}
	if how|codecGCM != e.codec || len(stored)+sealLen != int(e.stored) || len(raw) != int(e.raw) {
		return nil, errSealedOnce
	}
	seal, err := x.seal.cipher()
	if err != nil {
		return nil, err
	}
	nonce, aad := recordParams(new([unsealScratch]byte), x.seal.head, ord, e.raw, e.codec)
	sealed := seal.Seal(nil, nonce, stored, aad)
	if castagnoli(sealed) != e.crc {
		return nil, errSealedOnce
	}
	return sealed, nil
}

// build returns the object, and whether it lacks bytes that base has.
func (b *mending) build(ctx context.Context) (doc []byte, partial bool, err error) {
	x, r := b.base.x, b.c.r
	count, kind := uint32(0), b.kind
	var old []byte
	if x != nil {
		kind, count = x.kind, uint32(x.count())
		end := x.recordsAt()
		for ord := range count {
			e, _ := x.entry(ord)
			end += int64(e.stored)
		}
		old = make([]byte, end)
		if err := r.readFull(ctx, packObject(b.id, b.base.number), old, 0); err != nil {
			return nil, false, err
		}
	}
	for ord, w := range b.wounds {
		if x == nil && w.kind == kind && ord < maxPackEntries {
			count = max(count, ord+1)
		}
	}
	var to *packBuilder
	if x == nil || b.anew() {
		if to, err = newPackBuilder(nil, kind, b.id, r.repo, r.keys); err != nil {
			return nil, false, err
		}
	} else {
		to = newPackCopy(nil, x, b.id, r.repo)
	}
	for ord := range count {
		var e packEntry
		have := false
		if x != nil {
			e, have = x.entry(ord)
		}
		raw := b.content[ord]
		switch {
		case raw != nil && !b.anew() && to.seal != nil:
			sealed, err := b.sameSealed(ord, raw)
			if err != nil {
				return nil, false, err
			}
			to.keep(e, sealed)
		case raw != nil:
			stored, how, err := r.codec.compress(new([]byte), raw)
			if err != nil {
				return nil, false, err
			}
			to.add(stored, len(raw), how, b.wounds[ord].hash)
		case have && !e.absent() && !b.anew():
			to.keep(e, old[e.off:e.off+e.stored]) // damage as well: its checksum stays
		case have && !e.absent():
			stored := old[e.off : e.off+e.stored]
			plain, err := []byte(nil), errWrongLength
			if castagnoli(stored) == e.crc {
				plain, err = x.unseal(nil, stored, ord, &e)
			}
			if err != nil || len(plain) == 0 {
				partial = true
				to.drop(e)
				continue
			}
			to.add(plain, int(e.raw), e.codec&codecCompression, e.hash)
		case have:
			to.drop(e)
		default:
			e = packEntry{raw: 1}
			if w := b.wounds[ord]; w != nil && w.kind == kind {
				e.hash, e.raw = w.hash, w.raw
			}
			to.drop(e)
		}
	}
	return to.finish(), partial, nil
}

// keep appends a record as it is stored elsewhere, with the checksum that it had there.
func (b *packBuilder) keep(e packEntry, stored []byte) {
	e.off = uint32(len(b.buf))
	b.buf = append(b.buf, stored...)
	b.entries = e.append(b.entries)
}
