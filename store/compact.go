package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

// division is how the stored bytes of one pack divide.
type division struct {
	live, dead         int64 // bytes, with the index entries
	liveCount, deadCnt int
}

// garbage is the part that is dead, from 0 to 1.
func (s division) garbage() float64 {
	if s.dead == 0 {
		return 0
	}
	return float64(s.dead) / float64(s.live+s.dead)
}

// divide divides a pack. Records that were dropped already count for nothing. It is an
// error if a marked record is not there: then nothing about this pack is to be decided. It is damage, or
// another collection dropped what was garbage since it was marked.
func divide(id PackID, x *packIndex, live ordinals) (division, error) {
	var s division
	for ord := range uint32(x.count()) {
		e, _ := x.entry(ord)
		switch isLive := live.has(ord); {
		case isLive && e.absent():
			return s, x.recordError(Ref{Pack: id, Ord: ord}, "it is referred to and was dropped")
		case isLive:
			s.live += int64(e.stored) + packEntryLen
			s.liveCount++
		case !e.absent():
			s.dead += int64(e.stored) // its index entry stays
			s.deadCnt++
		}
	}
	if s.liveCount != live.count() {
		return s, x.recordError(Ref{Pack: id, Ord: uint32(x.count())}, "it is referred to and does not exist")
	}
	return s, nil
}

// compact writes the next generation of a pack: the same ID, ordinals and index,
// without the stored bytes of dead records. Nothing is decompressed or unsealed. The new object is durable
// when it returns; that another collection made it meanwhile is no error. Memory: the
// old object and the new one.
func (r *reader) compact(ctx context.Context, p packAt, x *packIndex, live ordinals) (size int64, err error) {
	end := x.recordsAt()
	for ord := range uint32(x.count()) {
		e, _ := x.entry(ord)
		end += int64(e.stored)
	}
	old := make([]byte, end)
	if err := r.readFull(ctx, p.object(), old, 0); err != nil {
		return 0, err
	}
	b := newPackCopy(make([]byte, 0, end), x, p.Pack, r.repo)
	for ord := range uint32(x.count()) {
		e, _ := x.entry(ord)
		if !live.has(ord) {
			b.drop(e)
			continue
		}
		stored := old[e.off : e.off+e.stored]
		if castagnoli(stored) != e.crc {
			return 0, x.recordError(Ref{Pack: p.Pack, Ord: ord}, "the stored bytes do not match their checksum")
		}
		b.add(stored, int(e.raw), e.codec, e.hash)
	}
	doc := b.finish()
	next := packAt{p.Pack, p.Generation + 1}
	err = r.blobs.Put(ctx, next.object(), bytes.NewReader(doc), int64(len(doc)))
	if err != nil && !errors.Is(err, ErrExists) {
		return 0, fmt.Errorf("compact %s: %w", p.object(), err)
	}
	return int64(len(doc)), nil
}

// drop keeps the ordinal of a record whose bytes go.
func (b *packBuilder) drop(e packEntry) {
	e.off, e.stored, e.crc, e.codec = uint32(len(b.buf)), 0, 0, codecAbsent
	b.entries = e.append(b.entries)
}
