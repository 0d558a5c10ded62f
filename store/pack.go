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

func appendPackHeader(b []byte, kind packKind, id PackID, repo [16]byte) []byte {
	b = append(b, packMagic...)
	b = append(b, packVersion, byte(kind), 0, 0, 0, 0, 0, 0)
	b = append(b, id[:]...)
	return append(b, repo[:]...)
}

// packFooter is the end of a pack.
type packFooter struct {
	indexOff int64
	count    int
	hash     Hash
}

// parsePackFooter reads the last packFooterLen bytes of an object of size bytes.
func parsePackFooter(p []byte, size int64) (packFooter, error) {
	if len(p) != packFooterLen || string(p[48:]) != packEnd {
		return packFooter{}, errors.New("no pack footer at its end")
	}
	f := packFooter{
		indexOff: int64(min(binary.LittleEndian.Uint64(p), maxPackLen)),
		count:    int(min(binary.LittleEndian.Uint32(p[8:]), maxPackEntries+1)),
		hash:     Hash(p[16:48]),
	}
	if f.count > maxPackEntries || f.indexOff < packHeaderLen ||
		f.indexOff+int64(f.count)*packEntryLen+packFooterLen != size {
		return packFooter{}, fmt.Errorf("the footer does not fit the object's length of %d bytes", size)
	}
	return f, nil
}

// packIndex is what a reader keeps of a pack. Its entries stay encoded: 52 bytes
// each.
type packIndex struct {
	kind       packKind
	generation uint32 // of the object that it is of
	entries    []byte
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
	f, err := parsePackFooter(footer, size)
	if err != nil {
		return nil, err
	}
	if len(header) != packHeaderLen || string(header[:8]) != packMagic || len(entries) != f.count*packEntryLen {
		return nil, errors.New("no pack header at its start")
	}
	if packHash(header, entries, footer) != f.hash {
		return nil, errors.New("header, index and footer do not match their hash")
	}
	if header[8] != packVersion {
		return nil, fmt.Errorf("%w: pack version %d", ErrVersion, header[8])
	}
	if PackID(header[16:32]) != id {
		return nil, fmt.Errorf("it is another pack: %s", PackID(header[16:32]))
	}
	if [16]byte(header[32:48]) != repo {
		return nil, fmt.Errorf("it belongs to another repository: %x", header[32:48])
	}
	x := &packIndex{kind: packKind(header[9]), entries: entries}
	if x.kind != kindData && x.kind != kindNode {
		return nil, fmt.Errorf("unknown pack %s", x.kind)
	}
	return x, x.check(f.indexOff)
}

// check makes sure that the records lie back to back and within limits.
func (x *packIndex) check(end int64) error {
	off := int64(packHeaderLen)
	for i := range x.count() {
		e, _ := x.entry(uint32(i))
		if e.absent() {
			if int64(e.off) != off || e.raw == 0 || int64(e.raw) > int64(x.kind.maxRaw()) || e.stored != 0 || e.crc != 0 {
				return fmt.Errorf("index entry %d of a dropped record is out of bounds", i)
			}
			continue
		}
		if e.codec&codecSeal != 0 || e.codec&codecCompression > codecZstd {
			return fmt.Errorf("%w: record %d has codec %#02x", ErrVersion, i, e.codec)
		}
		if int64(e.off) != off || e.raw == 0 || int64(e.raw) > int64(x.kind.maxRaw()) || e.stored == 0 ||
			e.codec == codecRaw && e.stored != e.raw || e.codec == codecZstd && e.stored >= e.raw {
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
}

func newPackBuilder(buf []byte, kind packKind, id PackID, repo [16]byte) *packBuilder {
	return &packBuilder{id: id, kind: kind, buf: appendPackHeader(buf[:0], kind, id, repo)}
}

func (b *packBuilder) count() int { return len(b.entries) / packEntryLen }

// add appends a record and returns its ordinal. The caller keeps the pack within
// the limits of the format.
func (b *packBuilder) add(stored []byte, raw int, how byte, h Hash) uint32 {
	e := packEntry{
		off: uint32(len(b.buf)), stored: uint32(len(stored)), raw: uint32(raw),
		crc: castagnoli(stored), codec: how, hash: h,
	}
	ord := uint32(b.count())
	b.buf = append(b.buf, stored...)
	b.entries = e.append(b.entries)
	return ord
}

// finish returns the whole object. The builder must not be used afterwards.
func (b *packBuilder) finish() []byte {
	var foot [packFooterLen]byte
	binary.LittleEndian.PutUint64(foot[:], uint64(len(b.buf)))
	binary.LittleEndian.PutUint32(foot[8:], uint32(b.count()))
	h := packHash(b.buf[:packHeaderLen], b.entries, foot[:])
	copy(foot[16:], h[:])
	copy(foot[48:], packEnd)
	b.buf = append(b.buf, b.entries...)
	return append(b.buf, foot[:]...)
}
