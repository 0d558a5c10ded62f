// Package tail keeps the end of what a program prints, for when it fails.
//
// It hides the bound. It may import no other package of Tidemark.
package tail

import (
	"strings"
	"sync"
)

const usual = 8 << 10

// Buffer keeps the last bytes written to it. The zero value keeps 8 KiB. Safe for concurrent use.
type Buffer struct {
	Max int // bytes; 0 means 8 KiB. Not to be changed while it is written to

	mu sync.Mutex
	b  []byte
}

// Write implements io.Writer; it never fails.
func (t *Buffer) Write(p []byte) (int, error) {
	limit := t.Max
	if limit == 0 {
		limit = usual
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if over := len(t.b) - limit; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

// String is what is kept, without white space around it.
func (t *Buffer) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}
