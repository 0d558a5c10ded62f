package store

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// cache keeps what was loaded last, bounded by the bytes it costs. Concurrent
// loads of one key are done once. Values are shared: nobody may change them.
type cache[K comparable, V any] struct {
	max int64 // bytes

	mu      sync.Mutex
	lru     *simplelru.LRU[K, cached[V]]
	bytes   int64
	loading map[K]*loading[V]
}

type cached[V any] struct {
	v    V
	cost int64
}

type loading[V any] struct {
	done chan struct{} // closed when v and err are set
	v    V
	err  error
}

func newCache[K comparable, V any](maxBytes int64) (*cache[K, V], error) {
	c := &cache[K, V]{max: maxBytes, loading: map[K]*loading[V]{}}
	// The bound is in bytes, kept below; the number of entries is free.
	lru, err := simplelru.NewLRU(math.MaxInt, func(_ K, e cached[V]) { c.bytes -= e.cost })
	if err != nil {
		return nil, fmt.Errorf("make cache: %w", err)
	}
	c.lru = lru
	return c, nil
}

// get returns the value of k, by load if it is not there. load returns the value's
// cost in bytes. Errors are not kept.
func (c *cache[K, V]) get(ctx context.Context, k K, load func(context.Context) (V, int64, error)) (V, error) {
	for {
		c.mu.Lock()
		if e, ok := c.lru.Get(k); ok {
			c.mu.Unlock()
			return e.v, nil
		}
		l, busy := c.loading[k]
		if !busy {
			l = &loading[V]{done: make(chan struct{})}
			c.loading[k] = l
			c.mu.Unlock()
			return c.fill(ctx, k, l, load)
		}
		c.mu.Unlock()
		select {
		case <-l.done:
		case <-ctx.Done():
			var none V
			return none, ctx.Err()
		}
		// Another caller's cancellation is not ours: try again.
		if l.err == nil || !errors.Is(l.err, context.Canceled) && !errors.Is(l.err, context.DeadlineExceeded) {
			return l.v, l.err
		}
	}
}

func (c *cache[K, V]) fill(ctx context.Context, k K, l *loading[V], load func(context.Context) (V, int64, error)) (V, error) {
	v, cost, err := load(ctx)
	c.loaded(k, l, v, cost, err)
	return v, err
}

// fillMany loads, with one call of load, what is neither there nor being loaded.
// load must call done for each of missing, which are indexes of keys.
func (c *cache[K, V]) fillMany(keys []K, load func(missing []int, done func(i int, v V, cost int64, err error))) {
	missing := make([]int, 0, len(keys))
	mine := make([]*loading[V], len(keys))
	c.mu.Lock()
	for i, k := range keys {
		if _, busy := c.loading[k]; busy || c.lru.Contains(k) {
			continue
		}
		mine[i] = &loading[V]{done: make(chan struct{})}
		c.loading[k] = mine[i]
		missing = append(missing, i)
	}
	c.mu.Unlock()
	if len(missing) > 0 {
		load(missing, func(i int, v V, cost int64, err error) { c.loaded(keys[i], mine[i], v, cost, err) })
	}
}

// loaded ends the loading of k.
func (c *cache[K, V]) loaded(k K, l *loading[V], v V, cost int64, err error) {
	l.v, l.err = v, err
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.loading, k)
	close(l.done)
	if l.err == nil && cost <= c.max {
		c.lru.Add(k, cached[V]{l.v, cost})
		for c.bytes += cost; c.bytes > c.max; {
			c.lru.RemoveOldest()
		}
	}
}

// drop forgets the value of k if it is still v.
func (c *cache[K, V]) drop(k K, v V) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.lru.Peek(k); ok && any(e.v) == any(v) {
		c.lru.Remove(k)
	}
}
