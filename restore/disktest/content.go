package disktest

import (
	"encoding/binary"
	"math/rand/v2"
)

// Content makes size bytes that look like a disk to tests: runs of noise, of
// repeated text and of zeroes, of lengths from 512 bytes to 256 KiB, not
// aligned to anything else. The same seed gives the same bytes.
func Content(size int, seed uint64) []byte {
	rnd := rand.New(rand.NewPCG(seed, 0x7469646d61726b))
	p := make([]byte, size)
	for off := 0; off < size; {
		end := min(off+512<<rnd.IntN(10), size)
		switch rnd.IntN(4) {
		case 0, 1: // zeroes
		case 2:
			for i := off; i < end; i++ {
				p[i] = byte(rnd.Uint32())
			}
		case 3:
			word := byte(1 + rnd.IntN(255))
			for i := off; i < end; i++ {
				p[i] = word + byte(i%7)
			}
		}
		off = end
	}
	return p
}

// Noise makes size bytes that cannot be compressed.
func Noise(size int, seed uint64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	p := make([]byte, size)
	_, _ = rand.NewChaCha8(key).Read(p) // never fails
	return p
}
