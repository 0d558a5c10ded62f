package store

import (
	"encoding/binary"
	"math/bits"

	"lukechampine.com/blake3"
	"lukechampine.com/blake3/guts"
)

// simdLen is what one step of the hash takes at best, in bytes.
const simdLen = guts.MaxSIMD * guts.ChunkSize

// hasher is BLAKE3-256, keyed in an encrypted repository: there nobody without the
// key can tell from a hash what is stored. Immutable.
type hasher struct {
	words [8]uint32
	flags uint32
	key   []byte // nil: not keyed
}

// plainHasher hashes what holds no content, and everything in a repository that is not
// encrypted.
var plainHasher = &hasher{words: guts.IV}

func newHasher(key [32]byte) *hasher {
	h := &hasher{flags: guts.FlagKeyedHash, key: key[:]}
	for i := range h.words {
		h.words[i] = binary.LittleEndian.Uint32(key[4*i:])
	}
	return h
}

// HashGrain returns the hash that the [Ref] of a grain with this content has in this
// repository. p has the disk's grain in bytes: the last one of a disk is filled up with
// zeroes. A grain of zeroes has a hash too, but is stored as the zero Ref.
func (r *Repo) HashGrain(p []byte) Hash { return r.ids.sum(p) }

// sum returns the hash of p.
//
// The library's Sum256 makes many small goroutines for a grain and leaves the last
// chunk for itself, so that most steps are not full. A grain is a perfect tree,
// which allows the plain way: full steps, then pairs of parents (BLAKE3 paper,
// section 2.1).
func (h *hasher) sum(p []byte) (out Hash) {
	n := len(p) / simdLen
	if len(p) > MaxGrain || n < 2 || len(p)%simdLen != 0 || bits.OnesCount(uint(n)) != 1 {
		if h.key == nil {
			return blake3.Sum256(p)
		}
		b := blake3.New(32, h.key)
		_, _ = b.Write(p) // never fails
		b.Sum(out[:0])
		return out
	}
	var cvs [MaxGrain / simdLen][8]uint32
	for i := range n {
		cvs[i] = guts.ChainingValue(guts.CompressBuffer(
			(*[simdLen]byte)(p[i*simdLen:]), simdLen, &h.words, uint64(i*guts.MaxSIMD), h.flags))
	}
	for ; n > 2; n /= 2 {
		for i := range n / 2 {
			cvs[i] = guts.ChainingValue(guts.ParentNode(cvs[2*i], cvs[2*i+1], &h.words, h.flags))
		}
	}
	root := guts.ParentNode(cvs[0], cvs[1], &h.words, h.flags)
	root.Flags |= guts.FlagRoot
	b := guts.WordsToBytes(guts.CompressNode(root))
	return Hash(b[:32])
}
