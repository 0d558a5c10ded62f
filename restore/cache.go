package restore

import (
	"context"
	"errors"
	"sync"

	"github.com/tidemark/tidemark/store"
)

// Cache keeps decoded grains in memory, least recently used out first. Grains
// are known by their content, so that disks and points that share content share the
// memory too. It is safe for concurrent use, and needs no closing.
type Cache struct {
	capacity int64 // bytes

	mu      sync.Mutex
	entries map[grainKey]*cachedGrain
	ring    cachedGrain // head of the list of loaded grains, newest first
	stats   CacheStats
	free    map[int][][]byte // buffers to be used again, by size
}

// CacheStats counts what a cache did since it was made.
type CacheStats struct {
	Bytes     int64 // kept now
	Hits      int64 // grains found, also while another reader was loading them
	Misses    int64 // grains loaded
	Evictions int64 // grains dropped for newer ones
}

// freeBuffers is how many buffers of each size wait for their next use.
const freeBuffers = 16

type grainKey struct {
	hash store.Hash
	size int // in bytes
}

// cachedGrain is a grain that is in the cache, being loaded, or out of the
// cache but still being read by someone. Its fields belong to the cache's lock,
// but for data: between loading and the last release nobody changes that.
type cachedGrain struct {
	key   grainKey
	data  []byte
	ready chan struct{} // closed when data or err is there
	err   error
	users int  // who may look at data
	gone  bool // no longer in the cache: the last user recycles data

	newer, older *cachedGrain // in the ring; nil if not in it
}

// NewCache makes a cache that keeps grains of up to capacity bytes. Grains
// that are being loaded or read at the moment come on top, one per reader or
// prefetcher.
func NewCache(capacity int64) *Cache {
	c := &Cache{capacity: capacity, entries: map[grainKey]*cachedGrain{}, free: map[int][][]byte{}}
	c.ring.newer, c.ring.older = &c.ring, &c.ring
	return c
}

// Stats returns the counters.
func (c *Cache) Stats() CacheStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

// grainReader reads the grains at refs into dst. It calls done once for each, from
// several goroutines, and returns after the last.
type grainReader func(ctx context.Context, refs []store.Ref, dst [][]byte, done func(i int, err error))

// enter sets grains to those at refs, of size bytes each, and loads those that nobody
// has loaded or is loading, all with one call of read. Zeroes are nil. The others may
// still be on their way: see wait. The caller must release all of them.
func (c *Cache) enter(ctx context.Context, refs []store.Ref, grains []*cachedGrain, size int, read grainReader) {
	var missing []int
	c.mu.Lock()
	for i, ref := range refs {
		grains[i] = nil
		if ref.IsZero() {
			continue
		}
		g, mine := c.enterLocked(grainKey{hash: ref.Hash, size: size})
		if grains[i] = g; mine {
			missing = append(missing, i)
		}
	}
	c.mu.Unlock()
	if len(missing) > 0 {
		c.load(ctx, refs, grains, missing, read)
	}
}

func (c *Cache) load(ctx context.Context, refs []store.Ref, grains []*cachedGrain, missing []int, read grainReader) {
	some, dst := make([]store.Ref, len(missing)), make([][]byte, len(missing))
	for k, i := range missing {
		some[k], dst[k] = refs[i], grains[i].data
	}
	read(ctx, some, dst, func(k int, err error) { c.loaded(grains[missing[k]], err) })
}

// wait waits until grains[i], which enter gave for refs[i], is loaded. If that
// failed because another reader gave up, it is loaded again, and grains[i] replaced.
func (c *Cache) wait(ctx context.Context, refs []store.Ref, grains []*cachedGrain, i int, read grainReader) error {
	for {
		g := grains[i]
		select {
		case <-g.ready:
		default:
			select {
			case <-g.ready:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if g.err == nil {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		// Who loaded it gave up; that is no news about the grain.
		if !errors.Is(g.err, context.Canceled) && !errors.Is(g.err, context.DeadlineExceeded) {
			return g.err
		}
		c.release(grains[i : i+1])
		c.enter(ctx, refs[i:i+1], grains[i:i+1], g.key.size, read)
	}
}

// enterLocked adds the caller to the grain's users. If mine is set, the grain is
// new and the caller must load it.
func (c *Cache) enterLocked(key grainKey) (g *cachedGrain, mine bool) {
	if g := c.entries[key]; g != nil {
		g.users++
		c.stats.Hits++
		if g.newer != nil {
			g.unlink()
			g.linkAfter(&c.ring)
		}
		return g, false
	}
	g = &cachedGrain{key: key, data: c.buffer(key.size), ready: make(chan struct{}), users: 1}
	c.entries[key] = g
	c.stats.Misses++
	return g, true
}

// loaded ends the loading of g.
func (c *Cache) loaded(g *cachedGrain, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	g.err = err
	if err != nil {
		delete(c.entries, g.key)
		g.gone = true
	} else {
		g.linkAfter(&c.ring)
		c.stats.Bytes += int64(len(g.data))
		for c.stats.Bytes > c.capacity {
			c.evict(c.ring.newer)
		}
	}
	close(g.ready)
}

// evict drops g, which is in the ring.
func (c *Cache) evict(g *cachedGrain) {
	g.unlink()
	delete(c.entries, g.key)
	c.stats.Bytes -= int64(len(g.data))
	c.stats.Evictions++
	g.gone = true
	if g.users == 0 {
		c.recycle(g)
	}
}

// release ends the caller's use of grains, of which some may be nil: it must not look
// at their data any more.
func (c *Cache) release(grains []*cachedGrain) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, g := range grains {
		if g == nil {
			continue
		}
		g.users--
		if g.users == 0 && g.gone {
			c.recycle(g)
		}
	}
}

func (c *Cache) buffer(size int) []byte {
	if f := c.free[size]; len(f) > 0 {
		c.free[size] = f[:len(f)-1]
		return f[len(f)-1]
	}
	return make([]byte, size)
}

func (c *Cache) recycle(g *cachedGrain) {
	if f := c.free[len(g.data)]; len(f) < freeBuffers {
		c.free[len(g.data)] = append(f, g.data)
	}
	g.data = nil
}

// The ring runs from its head through older to the oldest, whose older is the
// head again: the head's newer is the oldest.

func (g *cachedGrain) linkAfter(head *cachedGrain) {
	g.newer, g.older = head, head.older
	g.newer.older, g.older.newer = g, g
}

func (g *cachedGrain) unlink() {
	g.newer.older, g.older.newer = g.older, g.newer
	g.newer, g.older = nil, nil
}
