package store

import (
	"context"
	"io"
	"iter"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

// meetingStore holds requests up until others have begun that must not wait for them.
type meetingStore struct {
	blob.Store
	packs, damaged meeting
}

// meeting is of a number of requests.
type meeting struct {
	mu   sync.Mutex
	left int
	all  chan struct{}
}

func newMeeting(n int) meeting { return meeting{left: n, all: make(chan struct{})} }

// come waits for the others, and tells whether they came.
func (m *meeting) come(t time.Duration) bool {
	m.mu.Lock()
	if m.left--; m.left == 0 {
		close(m.all)
	}
	m.mu.Unlock()
	select {
	case <-m.all:
		return true
	case <-time.After(t):
		return false
	}
}

func (s *meetingStore) Put(ctx context.Context, name string, r io.Reader, n int64) error {
	switch {
	case strings.HasPrefix(name, packPrefix) && !s.packs.come(5*time.Second):
		return context.DeadlineExceeded
	case strings.HasPrefix(name, sessionPrefix) && !strings.Contains(name, ".") && !s.damaged.come(5*time.Second):
		return context.DeadlineExceeded
	}
	return s.Store.Put(ctx, name, r, n)
}

func (s *meetingStore) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	if prefix == damagePrefix && !s.damaged.come(5*time.Second) {
		return func(yield func(blob.Info, error) bool) { yield(blob.Info{}, context.DeadlineExceeded) }
	}
	return s.Store.List(ctx, prefix)
}

// An incremental is short, so what it waits for one after the other is what it takes.
func TestRequestsOfABackupThatRunAtOnce(t *testing.T) {
	r := testRepo(t)
	r.blobs = &meetingStore{Store: r.blobs, packs: newMeeting(2), damaged: newMeeting(2)}
	p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	wantClean(t, r, p)
}
