package restore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// The overlay file, all numbers little-endian:
//
//	0      header, one page of 4096 bytes
//	         0  magic "TMOVRLAY"
//	         8  version, uint32
//	        12  block size in bytes, uint32: 4096
//	        16  size of the disk in bytes, uint64
//	        24  length of the base's identity in bytes, uint32: 1 to 1024
//	        28  the base's identity, then zeroes
//	      4092  CRC-32C of bytes 0 to 4091
//	4096   bitmap, in whole pages: bit i of byte i/8 (lowest first) is 1 if
//	       block i lies in the overlay
//	then   block i at i*4096; what was never written is a hole
//
// The header never changes after the file got its name. Bits only ever turn to
// 1, and only after the block's data is durable. So any mixture of an old and
// a new bitmap page, as a power cut may leave it, is right.
const (
	overlayMagic      = "TMOVRLAY"
	overlayVersion    = 1
	overlayBlock      = 4096
	overlayHeader     = 4096
	overlayIdentityAt = 28
	overlayIdentity   = 1024 // longest identity
	overlaySumAt      = overlayHeader - 4
)

// The errors of an overlay file that cannot be used. Which one it is can be told by errors.Is.
var (
	ErrOverlayBusy     = errors.New("overlay is in use by another process")
	ErrOverlayBase     = errors.New("overlay belongs to another disk")
	ErrOverlayVersion  = errors.New("overlay has an unknown format version")
	ErrOverlayCorrupt  = errors.New("overlay is damaged")
	ErrNotOverlay      = errors.New("not a tidemark overlay")
	ErrOverlayIdentity = fmt.Errorf("identity of an overlay's base must have 1 to %d bytes", overlayIdentity)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// overlayShape is what the header says.
type overlayShape struct {
	size     int64  // of the disk, in bytes
	identity string // of the base
}

func (s overlayShape) blocks() int64 { return (s.size + overlayBlock - 1) / overlayBlock }

// dataAt is where block 0 lies in the file.
func (s overlayShape) dataAt() int64 {
	return overlayHeader + (s.blocks()+pageBlocks-1)/pageBlocks*bitmapPage
}

// fileSize is the length of the file in bytes.
func (s overlayShape) fileSize() int64 { return s.dataAt() + s.blocks()*overlayBlock }

func (s overlayShape) encode() []byte {
	p := make([]byte, overlayHeader)
	copy(p, overlayMagic)
	binary.LittleEndian.PutUint32(p[8:], overlayVersion)
	binary.LittleEndian.PutUint32(p[12:], overlayBlock)
	binary.LittleEndian.PutUint64(p[16:], uint64(s.size))
	binary.LittleEndian.PutUint32(p[24:], uint32(len(s.identity)))
	copy(p[overlayIdentityAt:], s.identity)
	binary.LittleEndian.PutUint32(p[overlaySumAt:], crc32.Checksum(p[:overlaySumAt], castagnoli))
	return p
}

// decodeOverlay reads a header of overlayHeader bytes. Its errors wrap one of
// the errors above.
func decodeOverlay(p []byte) (overlayShape, error) {
	if len(p) != overlayHeader || !bytes.HasPrefix(p, []byte(overlayMagic)) {
		return overlayShape{}, ErrNotOverlay
	}
	// The version comes before the sum: another version may have another sum.
	if v := binary.LittleEndian.Uint32(p[8:]); v != overlayVersion {
		return overlayShape{}, fmt.Errorf("version %d: %w", v, ErrOverlayVersion)
	}
	if binary.LittleEndian.Uint32(p[overlaySumAt:]) != crc32.Checksum(p[:overlaySumAt], castagnoli) {
		return overlayShape{}, fmt.Errorf("checksum of the header: %w", ErrOverlayCorrupt)
	}
	block := binary.LittleEndian.Uint32(p[12:])
	size := binary.LittleEndian.Uint64(p[16:])
	n := binary.LittleEndian.Uint32(p[24:])
	if block != overlayBlock || size > 1<<62 || n == 0 || n > overlayIdentity {
		return overlayShape{}, fmt.Errorf("header says blocks of %d bytes, disk of %d, identity of %d: %w", block, size, n, ErrOverlayCorrupt)
	}
	return overlayShape{size: int64(size), identity: string(p[overlayIdentityAt : overlayIdentityAt+n])}, nil
}
