package faultblob

import (
	"context"
	"io"
	"iter"
	"slices"
	"sync"

	"github.com/tidemark/tidemark/store/blob"
)

// Stale returns s with listings that lag: the last lag objects put through it are not
// listed, though they can be read. No backend of Tidemark may do that (see
// blob.Store); this shows what happens if one does.
func Stale(s blob.Store, lag int) blob.Store { return &stale{Store: s, lag: lag} }

type stale struct {
	blob.Store
	lag int

	mu     sync.Mutex
	newest []string
}

func (s *stale) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if err := s.Store.Put(ctx, name, r, size); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.newest = append(s.newest, name); len(s.newest) > s.lag {
		s.newest = s.newest[1:]
	}
	return nil
}

func (s *stale) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		s.mu.Lock()
		hidden := slices.Clone(s.newest)
		s.mu.Unlock()
		for info, err := range s.Store.List(ctx, prefix) {
			if err == nil && slices.Contains(hidden, info.Name) {
				continue
			}
			if !yield(info, err) {
				return
			}
		}
	}
}
