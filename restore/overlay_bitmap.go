package restore

import (
	"encoding/binary"
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	bitmapPage  = 4096           // bytes; what is written at once
	pageWords   = bitmapPage / 8 // words of a page
	pageBlocks  = bitmapPage * 8 // blocks that a page speaks of
	wordBlocks  = 64             // blocks that a word speaks of
	allOnesWord = ^uint64(0)     // a word of blocks that are all set
)

// blockBitmap tells which blocks lie in the overlay. Bits only ever go from 0 to 1.
//
// Looking needs no lock. Setting and taking pages take one: who sees a bit and
// then takes the dirty pages must find the page that holds it, or a Sync could
// miss the bit of a block that another writer brought in.
type blockBitmap struct {
	blocks int64
	words  []uint64 // read atomically, changed under mu

	mu    sync.Mutex
	dirty []bool // by page: changed since it was last taken
}

func newBlockBitmap(blocks int64) *blockBitmap {
	pages := (blocks + pageBlocks - 1) / pageBlocks
	return &blockBitmap{blocks: blocks, words: make([]uint64, pages*pageWords), dirty: make([]bool, pages)}
}

// pages is the number of pages that hold the bitmap.
func (b *blockBitmap) pages() int { return len(b.dirty) }

// run returns whether block from is set, and the end of the run of blocks of
// that kind, at most to.
func (b *blockBitmap) run(from, to int64) (set bool, end int64) {
	var flip uint64 // turns blocks of the run's kind into 0
	w := atomic.LoadUint64(&b.words[from/wordBlocks])
	if w>>(from%wordBlocks)&1 == 1 {
		set, flip = true, allOnesWord
	}
	at := from
	for {
		shift := at % wordBlocks
		if n := int64(bits.TrailingZeros64((w ^ flip) >> shift)); n < wordBlocks-shift {
			return set, min(at+n, to)
		}
		at += wordBlocks - shift
		if at >= to {
			return set, to
		}
		w = atomic.LoadUint64(&b.words[at/wordBlocks])
	}
}

// all tells whether all blocks of [from, to) are set.
func (b *blockBitmap) all(from, to int64) bool {
	if from >= to {
		return true
	}
	set, end := b.run(from, to)
	return set && end == to
}

// set sets the blocks of [from, to).
func (b *blockBitmap) set(from, to int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for from < to {
		w := from / wordBlocks
		end := min((w+1)*wordBlocks, to)
		mask := allOnesWord >> (wordBlocks - (end - from)) << (from % wordBlocks)
		if atomic.OrUint64(&b.words[w], mask)&mask != mask {
			b.dirty[w/pageWords] = true
		}
		from = end
	}
}

// dirtyPage is the content of a page as it goes to the file.
type dirtyPage struct {
	index int
	bytes []byte
}

// take returns copies of the pages that changed since the last call.
func (b *blockBitmap) take() []dirtyPage {
	b.mu.Lock()
	defer b.mu.Unlock()
	var taken []dirtyPage
	for i, d := range b.dirty {
		if !d {
			continue
		}
		b.dirty[i] = false
		p := make([]byte, bitmapPage)
		for k := range pageWords {
			binary.LittleEndian.PutUint64(p[k*8:], b.words[i*pageWords+k])
		}
		taken = append(taken, dirtyPage{index: i, bytes: p})
	}
	return taken
}

// putBack marks pages as changed again, whose writing failed.
func (b *blockBitmap) putBack(pages []dirtyPage) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range pages {
		b.dirty[p.index] = true
	}
}

// load takes page index as it was read from the file. It returns false if the page speaks of
// blocks that the disk does not have.
func (b *blockBitmap) load(index int, page []byte) bool {
	for k := range pageWords {
		w := binary.LittleEndian.Uint64(page[k*8:])
		i := index*pageWords + k
		if behind := int64(i+1)*wordBlocks - b.blocks; w != 0 && behind > 0 {
			if behind >= wordBlocks || w>>(wordBlocks-behind) != 0 {
				return false
			}
		}
		b.words[i] = w
	}
	return true
}
