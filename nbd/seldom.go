package nbd

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// seldom logs what clients can cause as often as they like: once per interval,
// with how many there were in between.
type seldom struct {
	mu   sync.Mutex
	next time.Time
	kept int
}

const seldomInterval = 10 * time.Second

func (s *seldom) log(to *slog.Logger, level slog.Level, message string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Before(s.next) {
		s.kept++
		return
	}
	if s.kept > 0 {
		args = append(args, "not logged before", s.kept)
	}
	s.next, s.kept = now.Add(seldomInterval), 0
	to.Log(context.Background(), level, message, args...)
}
