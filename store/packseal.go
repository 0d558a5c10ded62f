package store

import (
	"crypto/cipher"
	"crypto/hpke"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
)

const (
	capsuleInfo = "tidemark repository v1 data pack"

	// recordAADLen is the header, the raw length and the codec.
	recordAADLen = packHeaderLen + 4 + 1
	// unsealScratch is room for nonce and AAD of a record.
	unsealScratch = 12 + recordAADLen

	// maxSealedIndex is the longest sealed index, in bytes: all entries, and padding.
	maxSealedIndex = maxPackEntries*packEntryLen + 1<<20

	packSealCost = packHeaderLen + capsuleLen + 1024 // memory, roughly, in bytes
)

var zeroTag [sealLen]byte

// recordsAt is where the first record of a sealed pack begins. Those of grains come after the capsule: the
// pack's key, sealed to the content key.
func recordsAt(kind packKind) int64 {
	if kind == kindData {
		return packHeaderLen + capsuleLen
	}
	return packHeaderLen
}

// recordsAt is where the first record of the pack begins.
func (x *packIndex) recordsAt() int64 {
	if x.seal == nil {
		return packHeaderLen
	}
	return recordsAt(x.kind)
}

// nodePackKey is the key of a pack of nodes.
func (g *keySet) nodePackKey(id PackID) [32]byte { return derive(deriveNodePack, g.meta[:], id[:]) }

// recordParams fills p with what goes into the sealing of a record.
func recordParams(p *[unsealScratch]byte, header []byte, ord, raw uint32, codec byte) (nonce, aad []byte) {
	nonce, aad = p[:12], p[12:unsealScratch]
	clear(nonce)
	binary.LittleEndian.PutUint32(nonce, ord)
	copy(aad, header[:packHeaderLen])
	binary.LittleEndian.PutUint32(aad[packHeaderLen:], raw)
	aad[recordAADLen-1] = codec
	return nonce, aad
}

// packSealer seals one pack.
type packSealer struct {
	g       *keySet
	records cipher.AEAD // nil: the records are sealed already
}

// newPackSealer makes the pack's key. buf holds the header; the capsule is appended to it.
func newPackSealer(buf []byte, g *keySet) ([]byte, *packSealer, error) {
	s := &packSealer{g: g}
	if packKind(buf[9]) == kindNode {
		s.records = newGCM(g.nodePackKey(PackID(buf[16:32])))
		return buf, s, nil
	}
	key := randomKey()
	enc, to, err := hpke.NewSender(g.public, kdf(), aead(), []byte(capsuleInfo))
	if err != nil {
		return nil, nil, fmt.Errorf("seal the key of a pack: %w", err)
	}
	sealed, err := to.Seal(buf[:packHeaderLen], key[:])
	if err != nil {
		return nil, nil, fmt.Errorf("seal the key of a pack: %w", err)
	}
	s.records = newGCM(key)
	return append(append(buf, enc...), sealed...), s, nil
}

// sealAll seals records and index in their place and returns the whole object.
func (b *packBuilder) sealAll(foot *[packFooterLen]byte) []byte {
	scratch := new([unsealScratch]byte)
	for ord := range b.count() {
		if b.seal.records == nil {
			break
		}
		p := b.entries[ord*packEntryLen:][:packEntryLen]
		e := parsePackEntry(p)
		if e.absent() {
			continue
		}
		nonce, aad := recordParams(scratch, b.buf, uint32(ord), e.raw, e.codec)
		rec := b.buf[e.off : e.off+e.stored-sealLen]
		rec = b.seal.records.Seal(rec[:0], nonce, rec, aad)
		binary.LittleEndian.PutUint32(p[12:], castagnoli(rec))
	}
	at := len(b.buf)
	plain := 4 + len(b.entries)
	size := padded(at+plain+sealLen+packFooterLen, maxPadStep)
	binary.LittleEndian.PutUint32(foot[8:], uint32(size-at-packFooterLen))
	salt := randomKey()
	copy(foot[16:], salt[:])

	b.buf = binary.LittleEndian.AppendUint32(b.buf, uint32(b.count()))
	b.buf = append(b.buf, b.entries...)
	b.buf = append(b.buf, make([]byte, size-packFooterLen-sealLen-len(b.buf))...)
	index := b.buf[at:]
	head := b.buf[:recordsAt(b.kind)]
	b.buf = append(b.buf[:at], b.seal.g.indexKey(salt).seal(index[:0], index, indexAAD(head, foot[:]))...)
	return append(b.buf, foot[:]...)
}

func (g *keySet) indexKey(salt [32]byte) onceKey { return derive(deriveIndex, g.meta[:], salt[:]) }

// indexAAD is all of a pack but records and index: header, capsule, the footer's lengths.
func indexAAD(head, foot []byte) []byte {
	return append(append([]byte(nil), head...), foot[:16]...)
}

func packKeys(header []byte) uint32 { return binary.LittleEndian.Uint32(header[12:]) }

var errPackSeal = errors.New("header and index are not what was sealed in this repository")

// openPackIndex opens a sealed index. head is the object's beginning: header and capsule, or what there
// is of that. sealed is used as memory.
func openPackIndex(head, sealed, footer []byte, size int64, id PackID, repo [16]byte, g *keySet) (*packIndex, error) {
	f, err := parsePackFooter(footer, size, true)
	if err != nil {
		return nil, err
	}
	if len(head) < packHeaderLen || string(head[:8]) != packMagic || len(sealed) != f.indexLen || len(sealed) < sealLen {
		return nil, errors.New("no pack header at its start")
	}
	kind := packKind(head[9])
	n := recordsAt(kind)
	if int64(len(head)) < n || f.indexOff < n {
		return nil, errors.New("too short")
	}
	head = head[:n]
	plain, err := g.indexKey(f.hash).open(sealed[:0], sealed, indexAAD(head, footer))
	if err != nil || head[10] != packSealed {
		return nil, errPackSeal
	}
	if err := checkPackHeader(head, id, repo); err != nil {
		return nil, err
	}
	x := &packIndex{kind: kind, seal: &packSeal{g: g}}
	if x.entries, err = parseSealedIndex(plain); err != nil {
		return nil, err
	}
	x.seal.head = append([]byte(nil), head...)
	return x, x.check(f.indexOff)
}

// parseSealedIndex returns a copy of the entries in an opened index: number of records, entries, zeroes.
func parseSealedIndex(p []byte) ([]byte, error) {
	if len(p) < 4 {
		return nil, errPadding
	}
	n := binary.LittleEndian.Uint32(p)
	if n > maxPackEntries || int(n)*packEntryLen > len(p)-4 {
		return nil, fmt.Errorf("an index of %d records in %d bytes", n, len(p))
	}
	end := 4 + int(n)*packEntryLen
	for _, c := range p[end:] {
		if c != 0 {
			return nil, errPadding
		}
	}
	return append([]byte(nil), p[4:end]...), nil
}

// packSeal opens the records of one pack. The key is had when the first record is read: writers and
// those who look at indexes alone need none.
type packSeal struct {
	g       *keySet
	head    []byte // header and capsule
	once    sync.Once
	records cipher.AEAD
	err     error
}

// readable returns an error that wraps ErrWriterKey if the records of the pack can't be opened with the keys
// that there are.
func (x *packIndex) readable(ref Ref) error {
	if x.seal == nil || x.kind == kindNode || x.seal.g.private != nil {
		return nil
	}
	return fmt.Errorf("%s: record %d: %w", packObject(ref.Pack, x.generation), ref.Ord, ErrWriterKey)
}

func (s *packSeal) cipher() (cipher.AEAD, error) {
	s.once.Do(func() { s.records, s.err = s.open() })
	return s.records, s.err
}

func (s *packSeal) open() (cipher.AEAD, error) {
	if packKind(s.head[9]) == kindNode {
		return newGCM(s.g.nodePackKey(PackID(s.head[16:32]))), nil
	}
	capsule := s.head[packHeaderLen:]
	from, err := hpke.NewRecipient(capsule[:encapLen], s.g.private, kdf(), aead(), []byte(capsuleInfo))
	if err != nil {
		return nil, fmt.Errorf("the pack's key: %w", err)
	}
	key, err := from.Open(s.head[:packHeaderLen], capsule[encapLen:])
	if err != nil || len(key) != 32 {
		return nil, errors.New("the pack's key was not sealed to this repository's content key")
	}
	return newGCM([32]byte(key)), nil
}

// scratches hold nonces and AADs, so that no record needs memory for them.
var scratches = sync.Pool{New: func() any { return new([unsealScratch]byte) }}

// unseal appends the record to dst, which must not overlap stored.
func (x *packIndex) unseal(dst, stored []byte, ord uint32, e *packEntry) ([]byte, error) {
	c, err := x.seal.cipher()
	if err != nil {
		return nil, err
	}
	scratch := scratches.Get().(*[unsealScratch]byte)
	defer scratches.Put(scratch)
	nonce, aad := recordParams(scratch, x.seal.head, ord, e.raw, e.codec)
	p, err := c.Open(dst, nonce, stored, aad)
	if err != nil {
		return nil, errors.New("it is not what was sealed in this place")
	}
	return p, nil
}
