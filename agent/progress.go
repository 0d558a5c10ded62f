package agent

import (
	"sync"
	"time"
)

// meter counts bytes from several goroutines and reports now and then.
type meter struct {
	report func(Progress)

	mu   sync.Mutex
	now  Progress
	last time.Time
}

func (m *meter) start(p Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = p
	m.tell()
}

func (m *meter) add(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now.Done += n
	if time.Since(m.last) > 100*time.Millisecond {
		m.tell()
	}
}

func (m *meter) tell() {
	m.last = time.Now()
	if m.report != nil {
		m.report(m.now)
	}
}
