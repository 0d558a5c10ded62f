package agent

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// Limits bound what backups read of the disks while the guests run. 0 is no limit.
type Limits struct {
	BytesPerSecond int64
	IOPS           int64 // reads a second, each of at most 1 MiB
}

// throttle keeps Limits. Who waits is served in the order of coming.
type throttle struct{ bytes, ops *rate.Limiter }

func newThrottle(l Limits) throttle {
	var t throttle
	if l.BytesPerSecond > 0 {
		t.bytes = rate.NewLimiter(rate.Limit(l.BytesPerSecond), readChunk)
	}
	if l.IOPS > 0 {
		t.ops = rate.NewLimiter(rate.Limit(l.IOPS), 1)
	}
	return t
}

// wait waits until a read of n bytes, at most readChunk, keeps the limits.
func (t throttle) wait(ctx context.Context, n int64) error {
	if t.ops != nil {
		if err := t.ops.Wait(ctx); err != nil {
			return err
		}
	}
	if t.bytes != nil {
		return t.bytes.WaitN(ctx, int(n))
	}
	return nil
}

const (
	// sharedReads is how many pieces may be read, hashed and compressed at once, by all backups that
	// share a Pipeline: 1 MiB each.
	sharedReads = 32
	// sharedHeld is what all of them together may hold of disks that were read while their guests stood
	// still, in bytes.
	sharedHeld = 2 * maxHeld
)

// Pipeline is what several backups share: limits and memory. A backup asks for a few pieces at
// a time and all are served in the order of asking, so each gets about as much as any other, however
// large it is. What is read while a guest stands still never waits. Safe for concurrent use.
type Pipeline struct {
	throttle throttle
	reads    *semaphore.Weighted
	held     *semaphore.Weighted // bytes
	bufs     sync.Pool           // *[]byte of readChunk
}

// NewPipeline makes a Pipeline with limits for all of its backups together.
func NewPipeline(l Limits) *Pipeline {
	p := &Pipeline{throttle: newThrottle(l), reads: semaphore.NewWeighted(sharedReads), held: semaphore.NewWeighted(sharedHeld)}
	p.bufs.New = func() any {
		b := alignedBuffer(readChunk)
		return &b
	}
	return p
}

// lane is one backup's way through a Pipeline.
type lane struct {
	*Pipeline
	own throttle
}

// admit waits until the backup may read a piece of n bytes. The buffer is the caller's until it gives it back.
func (l *lane) admit(ctx context.Context, n int64) (buf []byte, giveBack func(), err error) {
	for _, t := range []throttle{l.own, l.throttle} {
		if err := t.wait(ctx, n); err != nil {
			return nil, nil, err
		}
	}
	if err := l.reads.Acquire(ctx, 1); err != nil {
		return nil, nil, err
	}
	b := l.bufs.Get().(*[]byte)
	return *b, func() {
		l.bufs.Put(b)
		l.reads.Release(1)
	}, nil
}

// hold waits until n bytes may be held in memory, at most maxHeld.
func (l *lane) hold(ctx context.Context, n int64) (letGo func(), err error) {
	if err := l.held.Acquire(ctx, n); err != nil {
		return nil, fmt.Errorf("wait for memory: %w", err)
	}
	return func() { l.held.Release(n) }, nil
}
