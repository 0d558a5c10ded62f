package nbd

import (
	"math/bits"
	"sync"
)

const (
	minBuffer = 64 << 10
	// bufferSlack is room for the head of a reply, so that head and data of
	// a power of two fit and leave in one write.
	bufferSlack = 64
)

// buffers lends byte slices by size class, so that a busy server makes no
// garbage and an odd size wastes less than half.
type buffers struct {
	classes [10]sync.Pool // minBuffer << i, up to maxPayload
}

type buffer struct {
	data  []byte // len is what was asked for
	class int
}

// classOf tells the size class for n bytes, 0 < n <= maxPayload+bufferSlack.
func classOf(n int) int {
	return bits.Len(uint((max(n-bufferSlack, 1) - 1) / minBuffer))
}

// cost is how much memory a buffer for n bytes takes.
func (p *buffers) cost(n int) int64 { return int64(minBuffer<<classOf(n)) + bufferSlack }

// get lends a buffer of n bytes, whose content is whatever was there before.
func (p *buffers) get(n int) *buffer {
	class := classOf(n)
	if b, ok := p.classes[class].Get().(*buffer); ok {
		b.data = b.data[:n]
		return b
	}
	return &buffer{data: make([]byte, n, minBuffer<<class+bufferSlack), class: class}
}

func (p *buffers) put(b *buffer) { p.classes[b.class].Put(b) }
