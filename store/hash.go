package store

import (
	"math/bits"

	"lukechampine.com/blake3"
	"lukechampine.com/blake3/guts"
)

// simdLen is what one step of the hash takes at best, in bytes.
const simdLen = guts.MaxSIMD * guts.ChunkSize

// HashGrain returns the hash that the [Ref] of a grain with this content has. p has the
// disk's grain in bytes: the last one of a disk is filled up with zeroes. A grain of
// zeroes has a hash too, but is stored as the zero Ref.
func HashGrain(p []byte) Hash { return sum(p) }

// sum returns the BLAKE3-256 hash of p.
//
// The library's Sum256 makes many small goroutines for a grain and leaves the last
// chunk for itself, so that most steps are not full. A grain is a perfect tree,
// which allows the plain way: full steps, then pairs of parents (BLAKE3 paper,
// section 2.1).
func sum(p []byte) Hash {
	n := len(p) / simdLen
	if len(p) > MaxGrain || n < 2 || len(p)%simdLen != 0 || bits.OnesCount(uint(n)) != 1 {
		return blake3.Sum256(p)
	}
	var cvs [MaxGrain / simdLen][8]uint32
	for i := range n {
		cvs[i] = guts.ChainingValue(guts.CompressBuffer(
			(*[simdLen]byte)(p[i*simdLen:]), simdLen, &guts.IV, uint64(i*guts.MaxSIMD), 0))
	}
	for ; n > 2; n /= 2 {
		for i := range n / 2 {
			cvs[i] = guts.ChainingValue(guts.ParentNode(cvs[2*i], cvs[2*i+1], &guts.IV, 0))
		}
	}
	root := guts.ParentNode(cvs[0], cvs[1], &guts.IV, 0)
	root.Flags |= guts.FlagRoot
	out := guts.WordsToBytes(guts.CompressNode(root))
	return Hash(out[:32])
}
