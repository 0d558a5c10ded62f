package cbt

import (
	"cmp"
	"iter"
	"math/bits"
	"slices"
)

// Extent is a run of bytes of a disk. Len is never 0.
type Extent struct {
	Off, Len int64
}

// Extents are ascending and don't touch or overlap.
type Extents []Extent

// Bytes is the sum of the lengths.
func (x Extents) Bytes() int64 {
	var n int64
	for _, e := range x {
		n += e.Len
	}
	return n
}

// Whole covers a disk of size bytes.
func Whole(size int64) Extents {
	if size <= 0 {
		return nil
	}
	return Extents{{0, size}}
}

// Align widens every extent to multiples of unit (a power of two), cut to size.
func (x Extents) Align(unit, size int64) Extents {
	var out Extents
	for _, e := range x {
		from := e.Off &^ (unit - 1)
		to := min((e.Off+e.Len+unit-1)&^(unit-1), size)
		if from >= to {
			continue
		}
		if n := len(out); n > 0 && out[n-1].Off+out[n-1].Len >= from {
			out[n-1].Len = max(out[n-1].Len, to-out[n-1].Off)
			continue
		}
		out = append(out, Extent{from, to - from})
	}
	return out
}

// Bitmap is one bit per granule of 1<<Shift bytes, least significant bit first,
// of a disk of Size bytes.
type Bitmap struct {
	Words []uint64
	Shift uint
	Size  int64
}

// Or adds the bits of words.
func (b Bitmap) Or(words []uint64) {
	n := min(len(b.Words), len(words))
	for i, w := range words[:n] {
		if w != 0 {
			b.Words[i] |= w
		}
	}
}

// count is the number of bits that are set.
func (b Bitmap) count() uint64 {
	var n int
	for _, w := range b.Words {
		n += bits.OnesCount64(w)
	}
	return uint64(n)
}

// runs yields maximal runs of set bits as granules [from, to).
func (b Bitmap) runs() iter.Seq2[uint64, uint64] {
	return func(yield func(from, to uint64) bool) {
		var from uint64
		in := false
		for i, w := range b.Words {
			base := uint64(i) * 64
			switch {
			case !in && w == 0, in && w == ^uint64(0):
				continue // the common case, 64 granules at a time
			}
			for bit := uint64(0); bit < 64; {
				if in {
					n := uint64(bits.TrailingZeros64(^(w >> bit)))
					if bit+n >= 64 {
						break
					}
					bit += n
					if !yield(from, base+bit) {
						return
					}
					in = false
				}
				n := uint64(bits.TrailingZeros64(w >> bit))
				if bit+n >= 64 {
					break
				}
				bit += n
				from, in = base+bit, true
			}
		}
		if in {
			yield(from, uint64(len(b.Words))*64)
		}
	}
}

// Extents are the runs of set bits, cut to the disk's size.
func (b Bitmap) Extents() Extents {
	var out Extents
	for from, to := range b.runs() {
		off := int64(from << b.Shift)
		end := min(int64(to<<b.Shift), b.Size)
		if off < end {
			out = append(out, Extent{off, end - off})
		}
	}
	return out
}

// Union covers what x or y covers.
func (x Extents) Union(y Extents) Extents {
	all := slices.Concat(x, y)
	slices.SortFunc(all, func(a, b Extent) int { return cmp.Compare(a.Off, b.Off) })
	var out Extents
	for _, e := range all {
		if n := len(out); n > 0 && out[n-1].Off+out[n-1].Len >= e.Off {
			out[n-1].Len = max(out[n-1].Len, e.Off+e.Len-out[n-1].Off)
			continue
		}
		out = append(out, e)
	}
	return out
}
