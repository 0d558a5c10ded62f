package store

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
)

// sessionGrains bounds what a session remembers of the grains it stored: between
// this and twice as many, at about 70 bytes each. So content that
// repeats farther away than 32 GiB of new data (at 64 KiB) is stored again,
// unless the disk asks for full deduplication and it lies in an older point.
const sessionGrains = 1 << 19

// session remembers which grains one Writer has stored. Safe for concurrent use.
type session struct {
	share *share // of limit

	mu       sync.Mutex
	limit    int
	young    map[Hash]place // two generations: when young is full, old is forgotten
	old      map[Hash]place
	packs    []PackID // so that a place is 8 bytes
	packAt   map[PackID]uint32
	inflight map[Hash]chan struct{}
}

type place struct {
	pack uint32 // index in a table of packs
	ord  uint32
}

func newSession(sh *share) *session {
	return &session{
		share: sh, limit: sessionGrains, young: map[Hash]place{},
		packAt: map[PackID]uint32{}, inflight: map[Hash]chan struct{}{},
	}
}

func (s *session) find(h Hash) (Ref, bool) {
	p, ok := s.young[h]
	if !ok {
		if p, ok = s.old[h]; !ok {
			return Ref{}, false
		}
		s.keep(h, p) // still in use
	}
	return Ref{Hash: h, Pack: s.packs[p.pack], Ord: p.ord}, true
}

func (s *session) keep(h Hash, p place) {
	if len(s.young) >= s.share.part(s.limit, leastGrains) {
		s.old, s.young = s.young, make(map[Hash]place)
	}
	s.young[h] = p
}

func (s *session) remember(ref Ref) {
	at, ok := s.packAt[ref.Pack]
	if !ok {
		at = uint32(len(s.packs))
		s.packs = append(s.packs, ref.Pack)
		s.packAt[ref.Pack] = at
	}
	s.keep(ref.Hash, place{at, ref.Ord})
}

// once returns the place of the grain h, by put if this session has not stored
// it. Of concurrent calls for one hash one puts and the others wait for it.
func (s *session) once(ctx context.Context, h Hash, put func() (Ref, error)) (Ref, error) {
	for {
		s.mu.Lock()
		if ref, ok := s.find(h); ok {
			s.mu.Unlock()
			return ref, nil
		}
		busy, wait := s.inflight[h]
		if !wait {
			done := make(chan struct{})
			s.inflight[h] = done
			s.mu.Unlock()

			ref, err := put()

			s.mu.Lock()
			if err == nil {
				s.remember(ref)
			}
			delete(s.inflight, h)
			s.mu.Unlock()
			close(done)
			return ref, err
		}
		s.mu.Unlock()
		select {
		case <-busy: // look again: if the other failed, it may be our turn
		case <-ctx.Done():
			return Ref{}, ctx.Err()
		}
	}
}

// dedupIndex finds grains in all data packs of the repository, as of when it was
// built. Memory: 16 bytes per grain stored, 256 MiB per TiB at 64 KiB, for as long as
// the Writer lives. Immutable, safe for concurrent use.
type dedupIndex struct {
	r     *reader
	keys  []dedupKey // ascending by prefix
	packs []PackID
}

type dedupKey struct {
	prefix uint64 // of the hash; candidates are checked against the pack's index
	place
}

func hashPrefix(h Hash) uint64 { return binary.BigEndian.Uint64(h[:]) }

// newDedupIndex reads the indexes of all packs. Damaged and condemned packs are left out, and
// records known to be lost: nothing new may refer to them.
func newDedupIndex(ctx context.Context, r *reader, condemned map[PackID]struct{}, lost *marks) (*dedupIndex, error) {
	d := &dedupIndex{r: r}
	for p, err := range r.packObjects(ctx, packPrefix) {
		if err != nil {
			return nil, err
		}
		id := p.Pack
		if len(d.packs) > 0 && d.packs[len(d.packs)-1] == id { // an older generation
			continue
		}
		if _, ok := condemned[id]; ok {
			continue
		}
		// Past the cache: this would only sweep it out.
		x, err := r.loadIndex(ctx, id)
		if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrVersion) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if x.kind != kindData {
			continue
		}
		for ord := range x.count() {
			e, _ := x.entry(uint32(ord))
			if e.absent() || lost.has(Ref{Pack: id, Ord: uint32(ord)}) {
				continue
			}
			d.keys = append(d.keys, dedupKey{hashPrefix(e.hash), place{uint32(len(d.packs)), uint32(ord)}})
		}
		d.packs = append(d.packs, id)
	}
	slices.SortFunc(d.keys, func(a, b dedupKey) int { return cmp.Compare(a.prefix, b.prefix) })
	return d, nil
}

// find returns a stored grain of hash h.
func (d *dedupIndex) find(ctx context.Context, h Hash) (Ref, bool, error) {
	want := hashPrefix(h)
	i, _ := slices.BinarySearchFunc(d.keys, want, func(k dedupKey, p uint64) int { return cmp.Compare(k.prefix, p) })
	for ; i < len(d.keys) && d.keys[i].prefix == want; i++ {
		ref := Ref{Hash: h, Pack: d.packs[d.keys[i].pack], Ord: d.keys[i].ord}
		switch _, err := d.r.locate(ctx, ref, kindData); {
		case err == nil:
			return ref, true, nil
		case errors.Is(err, ErrCorrupt): // another hash of the same prefix, or lost since
		default:
			return Ref{}, false, err
		}
	}
	return Ref{}, false, nil
}
