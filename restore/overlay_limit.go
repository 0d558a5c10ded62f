package restore

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrOverlayFull is wrapped by writes that would take an overlay past its limit. It
// is unix.ENOSPC too.
var ErrOverlayFull = fmt.Errorf("overlay has reached its limit: %w", unix.ENOSPC)

// space bounds the blocks of an overlay that hold data. It costs one bit per block more, only
// where there is a limit.
type space struct {
	limit int64 // blocks

	mu   sync.Mutex
	data []uint64 // blocks that may hold data
	used int64    // bits set in data
}

// Limit bounds the data that the overlay holds to bytes, rounded down to blocks of 4 KiB: a write that
// needs more fails with [ErrOverlayFull] and changes nothing of its block.
// Blocks that hold data already can be written always; Zero and Trim give space back. The bitmap comes on top, at most
// 32 MiB per TiB of the disk. It must be called before any other call, at most once.
//
// If the overlay holds more than that already, nothing new can be written.
func (o *Overlay) Limit(bytes int64) error {
	if bytes < 0 || o.space != nil {
		return fmt.Errorf("limit an overlay to %d bytes: %w", bytes, ErrRange)
	}
	s := &space{limit: bytes / overlayBlock, data: make([]uint64, (o.shape.blocks()+wordBlocks-1)/wordBlocks)}
	start, end := o.shape.dataAt(), o.shape.fileSize()
	for at := start; at < end; {
		from, err := o.file.NextData(at)
		if errors.Is(err, io.EOF) || err == nil && from >= end {
			break
		}
		if err != nil {
			return fmt.Errorf("limit overlay: %w", err)
		}
		to, err := o.file.NextHole(from)
		if err != nil {
			return fmt.Errorf("limit overlay: %w", err)
		}
		to = min(max(to, from+1), end)
		s.mark((from-start)/overlayBlock, (to-start+overlayBlock-1)/overlayBlock)
		at = to
	}
	o.space = s
	return nil
}

// Used is the data that a limited overlay holds, in bytes; 0 if it has no limit.
func (o *Overlay) Used() int64 {
	if o.space == nil {
		return 0
	}
	o.space.mu.Lock()
	defer o.space.mu.Unlock()
	return o.space.used * overlayBlock
}

// reserve makes sure that the blocks of [from, to) may be written. The caller holds their regions' locks.
// What was reserved stays so if the write fails: it may have left something.
func (s *space) reserve(from, to int64) error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used+to-from-s.count(from, to) > s.limit {
		return ErrOverlayFull
	}
	s.mark(from, to)
	return nil
}

// free says that the blocks of [from, to) are holes. The caller holds their regions' locks.
func (s *space) free(from, to int64) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= s.count(from, to)
	eachWord(from, to, func(w int64, mask uint64) { s.data[w] &^= mask })
}

func (s *space) mark(from, to int64) {
	s.used += to - from - s.count(from, to)
	eachWord(from, to, func(w int64, mask uint64) { s.data[w] |= mask })
}

func (s *space) count(from, to int64) (n int64) {
	eachWord(from, to, func(w int64, mask uint64) { n += int64(bits.OnesCount64(s.data[w] & mask)) })
	return n
}

// eachWord calls f for the words of a bitmap that speak of [from, to).
func eachWord(from, to int64, f func(w int64, mask uint64)) {
	for from < to {
		w := from / wordBlocks
		end := min((w+1)*wordBlocks, to)
		f(w, allOnesWord>>(wordBlocks-(end-from))<<(from%wordBlocks))
		from = end
	}
}
