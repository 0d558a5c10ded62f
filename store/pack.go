package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"lukechampine.com/blake3"
)

// The layout of a pack, see docs/format.md: header, records back to back, index,
// footer. All integers are little-endian.
const (
	packMagic   = "TIDEPACK"
	packEnd     = "KCAPEDIT"
	packVersion = 1

	packSealed = 1 // byte 10 of the header

	packHeaderLen = 48
	packEntryLen  = 52
	packFooterLen = 56

	// Limits of the format: what a reader must be able to hold.
	maxPackEntries = 1 << 16
	maxPackLen     = 1 << 30
)

// packKind says what a pack's records are. They are kept apart so that grains,
// which a guest chooses, can never be taken for map nodes.
type packKind uint8

const (
	kindData packKind = 1
	kindNode packKind = 2
)

func (k packKind) String() string {
	switch k {
	case kindData:
		return "data"
	case kindNode:
		return "node"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// maxRaw is the size of the largest record, in bytes, before compression.
func (k packKind) maxRaw() int {
	if k == kindNode {
		return maxNodeLen
	}
	return MaxGrain
}

// packPrefix is the folder of all packs.
const packPrefix = "packs/"

// packName returns the name of a pack's object. The two digits keep folders
// small.
func packName(id PackID) string {
	s := id.String()
	return packPrefix + s[:2] + "/" + s
}

// packEntry is the index entry of one record.
type packEntry struct {
	off    uint32 // of the record, from the start of the object
	stored uint32 // bytes in the object
	raw    uint32 // bytes when decompressed
	crc    uint32 // CRC-32C of the stored bytes
	codec  byte
	hash   Hash // of the raw bytes
}

// absent tells whether compaction has dropped the record: it keeps its ordinal,
// hash and raw length, and has no stored bytes.
func (e *packEntry) absent() bool { return e.codec == codecAbsent }

func castagnoli(p []byte) uint32 { return crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)) }

func (e *packEntry) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, e.off)
	b = binary.LittleEndian.AppendUint32(b, e.stored)
	b = binary.LittleEndian.AppendUint32(b, e.raw)
	b = binary.LittleEndian.AppendUint32(b, e.crc)
	b = append(b, e.codec, 0, 0, 0)
	return append(b, e.hash[:]...)
}

func parsePackEntry(p []byte) packEntry {
	return packEntry{
		off:    binary.LittleEndian.Uint32(p),
		stored: binary.LittleEndian.Uint32(p[4:]),
		raw:    binary.LittleEndian.Uint32(p[8:]),
		crc:    binary.LittleEndian.Uint32(p[12:]),
		codec:  p[16],
		hash:   Hash(p[20:52]),
	}
}

// appendPackHeader makes a header. sealedBy is nil if the repository is not encrypted.
func appendPackHeader(b []byte, kind packKind, id PackID, repo [16]byte, sealedBy *keySet) []byte {
	b = append(b, packMagic...)
	if sealedBy == nil {
		b = append(b, packVersion, byte(kind), 0, 0, 0, 0, 0, 0)
	} else {
		b = append(b, packVersion, byte(kind), packSealed, 0)
		b = binary.LittleEndian.AppendUint32(b, sealedBy.number)
	}
	b = append(b, id[:]...)
	return append(b, repo[:]...)
}

// packFooter is the end of a pack.
type packFooter struct {
	indexOff int64
	indexLen int
	hash     [32]byte // of a sealed pack: salt
}

// parsePackFooter reads the last packFooterLen bytes of an object of size bytes. Of a pack that is not
// sealed it gives the number of records, of others the length of the index.
func parsePackFooter(p []byte, size int64, sealed bool) (packFooter, error) {
	if len(p) != packFooterLen || string(p[48:]) != packEnd {
		return packFooter{}, errors.New("no pack footer at its end")
	}
	entry, most := int64(packEntryLen), int64(maxPackEntries)
	if sealed {
		entry, most = 1, maxSealedIndex
	}
	n := int64(binary.LittleEndian.Uint32(p[8:]))
	f := packFooter{
		indexOff: int64(min(binary.LittleEndian.Uint64(p), maxPackLen)),
		indexLen: int(min(n, most) * entry),
		hash:     [32]byte(p[16:48]),
	}
	if n > most || f.indexOff < packHeaderLen || f.indexOff+int64(f.indexLen)+packFooterLen != size {
		return packFooter{}, fmt.Errorf("the footer does not fit the object's length of %d bytes", size)
	}
	return f, nil
}

// packIndex is what a reader keeps of a pack. Its entries stay encoded: 52 bytes
// each.
type packIndex struct {
	kind       packKind
	pack       PackID
	generation uint32 // of the object that it is of
	entries    []byte
	seal       *packSeal // nil: not sealed
	touches    touches
}

// cost is the memory of an index, roughly, in bytes.
func (x *packIndex) cost() int64 {
	n := int64(len(x.entries)) + x.touches.cost() + 160
	if x.seal != nil {
		n += packSealCost
	}
	return n
}

func (x *packIndex) count() int { return len(x.entries) / packEntryLen }

// entry returns entry ord, or false if there is none.
func (x *packIndex) entry(ord uint32) (packEntry, bool) {
	if int64(ord) >= int64(x.count()) {
		return packEntry{}, false
	}
	return parsePackEntry(x.entries[int(ord)*packEntryLen:][:packEntryLen]), true
}

// parsePackIndex checks header, index and footer against each other. The index's
// bytes are kept, not copied. The hash comes first: only what was
// written as it is can be of a newer version; all else is damage.
func parsePackIndex(header, entries, footer []byte, size int64, id PackID, repo [16]byte) (*packIndex, error) {
	f, err := parsePackFooter(footer, size, false)
	if err != nil {
		return nil, err
	}
	if len(header) != packHeaderLen || string(header[:8]) != packMagic || len(entries) != f.indexLen {
		return nil, errors.New("no pack header at its start")
	}
	if packHash(header, entries, footer) != f.hash {
		return nil, errors.New("header, index and footer do not match their hash")
	}
	x := &packIndex{kind: packKind(header[9]), entries: entries}
	if err := checkPackHeader(header, id, repo); err != nil {
		return nil, err
	}
	return x, x.check(f.indexOff)
}

// checkPackHeader checks a header whose bytes are known to be what was written.
func checkPackHeader(header []byte, id PackID, repo [16]byte) error {
	kind := packKind(header[9])
	switch {
	case header[8] != packVersion:
		return fmt.Errorf("%w: pack version %d", ErrVersion, header[8])
	case PackID(header[16:32]) != id:
		return fmt.Errorf("it is another pack: %s", PackID(header[16:32]))
	case [16]byte(header[32:48]) != repo:
		return fmt.Errorf("it belongs to another repository: %x", header[32:48])
	case kind != kindData && kind != kindNode:
		return fmt.Errorf("unknown pack %s", kind)
	}
	return nil
}

// check makes sure that the records lie back to back and within limits.
func (x *packIndex) check(end int64) error {
	off, seal, added := x.recordsAt(), byte(0), int64(0)
	if x.seal != nil {
		seal, added = codecGCM, sealLen
	}
	for i := range x.count() {
		e, _ := x.entry(uint32(i))
		if e.absent() {
			if int64(e.off) != off || e.raw == 0 || int64(e.raw) > int64(x.kind.maxRaw()) || e.stored != 0 || e.crc != 0 {
				return fmt.Errorf("index entry %d of a dropped record is out of bounds", i)
			}
			continue
		}
		if e.codec&codecSeal != seal || e.codec&codecCompression > codecZstd {
			return fmt.Errorf("%w: record %d has codec %#02x", ErrVersion, i, e.codec)
		}
		stored := int64(e.stored) - added
		if int64(e.off) != off || e.raw == 0 || int64(e.raw) > int64(x.kind.maxRaw()) || stored <= 0 ||
			e.codec&codecCompression == codecRaw && stored != int64(e.raw) || e.codec&codecCompression == codecZstd && stored >= int64(e.raw) {
			return fmt.Errorf("index entry %d is out of order or out of bounds", i)
		}
		off += int64(e.stored)
	}
	if off != end {
		return errors.New("the records do not end where the index begins")
	}
	return nil
}

// packHash covers everything but the records, which have hashes of their own.
func packHash(header, entries, footer []byte) (h Hash) {
	b := blake3.New(32, nil)
	_, _ = b.Write(header) // never fails
	_, _ = b.Write(entries)
	_, _ = b.Write(footer[:16])
	b.Sum(h[:0])
	return h
}

// packBuilder puts a pack together in memory.
type packBuilder struct {
	id      PackID
	kind    packKind
	buf     []byte // header and records
	entries []byte
	seal    *packSealer // nil: not sealed
}

// newPackBuilder begins a pack in buf. keys is nil if the repository is not encrypted.
func newPackBuilder(buf []byte, kind packKind, id PackID, repo [16]byte, keys *keyring) (*packBuilder, error) {
	b := &packBuilder{id: id, kind: kind}
	if keys == nil {
		b.buf = appendPackHeader(buf[:0], kind, id, repo, nil)
		return b, nil
	}
	g := keys.newest()
	b.buf = appendPackHeader(buf[:0], kind, id, repo, g)
	var err error
	b.buf, b.seal, err = newPackSealer(b.buf, g)
	return b, err
}

// newPackCopy begins the next generation of the pack of x: it takes records as they are stored there, sealed
// or not.
func newPackCopy(buf []byte, x *packIndex, id PackID, repo [16]byte) *packBuilder {
	b := &packBuilder{id: id, kind: x.kind}
	if x.seal == nil {
		b.buf = appendPackHeader(buf[:0], x.kind, id, repo, nil)
		return b
	}
	buf = append(buf[:0], x.seal.head...)
	b.buf, b.seal = buf, &packSealer{g: x.seal.g}
	return b
}

func (b *packBuilder) count() int { return len(b.entries) / packEntryLen }

// add appends a record and returns its ordinal. The caller keeps the pack within
// the limits of the format. Records are sealed by finish: not one by one under their writers' lock.
func (b *packBuilder) add(stored []byte, raw int, how byte, h Hash) uint32 {
	e := packEntry{
		off: uint32(len(b.buf)), stored: uint32(len(stored)), raw: uint32(raw),
		codec: how, hash: h,
	}
	b.buf = append(b.buf, stored...)
	if b.seal == nil || b.seal.records == nil {
		e.crc = castagnoli(stored)
	} else {
		e.codec |= codecGCM
		e.stored += sealLen
		b.buf = append(b.buf, zeroTag[:]...)
	}
	ord := uint32(b.count())
	b.entries = e.append(b.entries)
	return ord
}

// overhead is what the pack costs beside records and entries, without its padding, in bytes.
func (b *packBuilder) overhead() int64 {
	if b.seal == nil {
		return packHeaderLen + packFooterLen
	}
	return recordsAt(b.kind) + 4 + sealLen + packFooterLen
}

// recordCost is what a record of n stored bytes, as given to add, costs.
func (b *packBuilder) recordCost(n int) int64 {
	if b.seal != nil && b.seal.records != nil {
		n += sealLen
	}
	return int64(n) + packEntryLen
}

// finish returns the whole object. The builder must not be used afterwards.
func (b *packBuilder) finish() []byte {
	var foot [packFooterLen]byte
	binary.LittleEndian.PutUint64(foot[:], uint64(len(b.buf)))
	copy(foot[48:], packEnd)
	if b.seal != nil {
		return b.sealAll(&foot)
	}
	binary.LittleEndian.PutUint32(foot[8:], uint32(b.count()))
	h := packHash(b.buf[:packHeaderLen], b.entries, foot[:])
	copy(foot[16:], h[:])
	b.buf = append(b.buf, b.entries...)
	return append(b.buf, foot[:]...)
}
