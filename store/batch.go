package store

import (
	"bytes"
	"cmp"
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// Bounds of batched reads.
const (
	// mergeGap is how many bytes between two records are read for nothing rather
	// than asking twice. At 100 MB/s they take 0.6 ms, less than any request
	// to another host.
	mergeGap = 64 << 10
	// maxRange bounds one request, in bytes, so that large reads are several at a
	// time and the memory of one is bounded.
	maxRange = 1 << 20
	// maxRequests is how many ranges of one reader are on their way at once.
	maxRequests = 16
)

// ReadGrains reads many grains at once: those that lie near each other in one
// pack with one request, several requests at a time. dst[i], whose length is the
// disk's grain in bytes, gets the grain at refs[i], with the guarantees of
// [Repo.ReadGrain]. done is called once per grain, when it is complete, from
// several goroutines, and must not read itself. ReadGrains returns after the last of them.
func (r *Repo) ReadGrains(ctx context.Context, refs []Ref, dst [][]byte, done func(i int, err error)) {
	at := make([]int, 0, len(refs))
	for i, ref := range refs {
		if ref.IsZero() {
			clear(dst[i])
			done(i, ctx.Err())
			continue
		}
		at = append(at, i)
	}
	r.readMany(ctx, kindData, refs, at,
		func(i, raw int) ([]byte, error) { return grainLen(dst[i])(raw) },
		func(i int, err error) {
			if err != nil {
				clear(dst[i])
			}
			done(i, err)
		})
}

// batch is one call of readMany.
type batch struct {
	r    *reader
	kind packKind
	refs []Ref
	dst  func(i, raw int) ([]byte, error)
	done func(i int, err error)
	g    *errgroup.Group
}

// readMany reads the records of refs[i] for each i of at, into what dst returns
// for their raw length. done is called once for each i, from several goroutines;
// readMany returns after the last.
func (r *reader) readMany(ctx context.Context, kind packKind, refs []Ref, at []int, dst func(i, raw int) ([]byte, error), done func(i int, err error)) {
	if len(at) == 1 {
		i := at[0]
		done(i, r.record(ctx, refs[i], kind, func(raw int) ([]byte, error) { return dst(i, raw) }))
		return
	}
	// Ordinals ascend with offsets.
	slices.SortFunc(at, func(a, b int) int {
		return cmp.Or(bytes.Compare(refs[a].Pack[:], refs[b].Pack[:]), cmp.Compare(refs[a].Ord, refs[b].Ord))
	})
	b := &batch{r: r, kind: kind, refs: refs, dst: dst, done: done, g: &errgroup.Group{}}
	b.g.SetLimit(maxRequests)
	for len(at) > 0 {
		n := 1
		for n < len(at) && refs[at[n]].Pack == refs[at[0]].Pack {
			n++
		}
		of := at[:n]
		at = at[n:]
		b.g.Go(func() error {
			b.pack(ctx, of)
			return nil
		})
	}
	_ = b.g.Wait() // errors are in done
}

// wanted is a record of a range.
type wanted struct {
	i int
	e packEntry
}

// pack reads records of one pack, ascending.
func (b *batch) pack(ctx context.Context, at []int) {
	x, err := b.r.index(ctx, b.refs[at[0]].Pack)
	if err != nil {
		for _, i := range at {
			b.done(i, err)
		}
		return
	}
	found := make([]wanted, 0, len(at))
	for _, i := range at {
		e, err := x.locate(b.refs[i], b.kind)
		if err != nil {
			b.done(i, err)
			continue
		}
		found = append(found, wanted{i, e})
	}
	for len(found) > 0 {
		n := 1
		for n < len(found) && joins(found[0].e, found[n-1].e, found[n].e) {
			n++
		}
		part := found[:n]
		found = found[n:]
		run := func() error {
			b.span(ctx, x, part)
			return nil
		}
		// Here, if there are enough others or nothing else is left to do here.
		if len(found) == 0 || !b.g.TryGo(run) {
			_ = run()
		}
	}
}

// joins tells whether next, which comes after last, is worth reading with a range
// that begins with first.
func joins(first, last, next packEntry) bool {
	end := int64(last.off) + int64(last.stored)
	return int64(next.off)-end <= mergeGap && int64(next.off)+int64(next.stored)-int64(first.off) <= maxRange
}

// span reads records with one request. What fails is read again record by record, which
// follows a pack that moved, and tells what of a damaged object is good.
func (b *batch) span(ctx context.Context, x *packIndex, part []wanted) {
	if len(part) == 1 {
		b.single(ctx, part[0])
		return
	}
	// What was read is decoded within the limit, which so bounds the buffers too.
	if b.r.limited(ctx, func() error { return b.spanNow(ctx, x, part) }) == nil {
		return
	}
	for _, w := range part {
		b.single(ctx, w)
	}
}

// spanNow returns an error if nothing could be read.
func (b *batch) spanNow(ctx context.Context, x *packIndex, part []wanted) error {
	first, last := part[0].e, part[len(part)-1].e
	n := int(last.off+last.stored) - int(first.off)
	buf := b.r.spans.Get().(*[]byte)
	defer b.r.spans.Put(buf)
	if cap(*buf) < n {
		*buf = make([]byte, n)
	}
	p := (*buf)[:n]
	if err := b.r.readFull(ctx, packObject(b.refs[part[0].i].Pack, x.generation), p, int64(first.off)); err != nil {
		return err
	}
	parallel(len(part), func(k int) {
		w := part[k]
		dst, err := b.dst(w.i, int(w.e.raw))
		if err != nil {
			b.done(w.i, x.recordError(b.refs[w.i], err.Error()))
			return
		}
		from := w.e.off - first.off
		b.done(w.i, b.r.decode(x, b.refs[w.i], w.e, p[from:from+w.e.stored], dst))
	})
	return nil
}

func (b *batch) single(ctx context.Context, w wanted) {
	b.done(w.i, b.r.limited(ctx, func() error {
		return b.r.record(ctx, b.refs[w.i], b.kind, func(raw int) ([]byte, error) { return b.dst(w.i, raw) })
	}))
}

// limited runs read when fewer than maxRequests others of batches run.
func (r *reader) limited(ctx context.Context, read func() error) error {
	select {
	case r.requests <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-r.requests }()
	return read()
}

// parallel calls f with 0 to n-1, on all processors if there is work for them.
func parallel(n int, f func(i int)) {
	const each = 4 // calls that are worth a goroutine
	var next atomic.Int64
	work := func() {
		for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
			f(int(i))
		}
	}
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), n/each) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
}

// loadNodes brings those of the nodes into the cache that are not there, with few
// requests. What fails is left to who needs it.
func (r *reader) loadNodes(ctx context.Context, refs []Ref) {
	keys := make([]Hash, len(refs))
	for i, ref := range refs {
		keys[i] = ref.Hash
	}
	r.nodes.fillMany(keys, func(missing []int, done func(i int, n *node, cost int64, err error)) {
		r.readNodesAt(ctx, refs, missing, func(i int, n *node, err error) {
			if err != nil {
				done(i, nil, 0, err)
				return
			}
			done(i, n, n.cost(), nil)
		})
	})
}

// readNodes reads nodes with few requests, past the cache.
func (r *reader) readNodes(ctx context.Context, refs []Ref) ([]*node, []error) {
	nodes, errs := make([]*node, len(refs)), make([]error, len(refs))
	all := make([]int, len(refs))
	for i := range all {
		all[i] = i
	}
	r.readNodesAt(ctx, refs, all, func(i int, n *node, err error) { nodes[i], errs[i] = n, err })
	return nodes, errs
}

// readNodesAt reads the nodes of refs[i] for each i of at, as readMany does.
func (r *reader) readNodesAt(ctx context.Context, refs []Ref, at []int, done func(i int, n *node, err error)) {
	raw := make([][]byte, len(refs))
	r.readMany(ctx, kindNode, refs, at,
		func(i, n int) ([]byte, error) {
			raw[i] = make([]byte, n)
			return raw[i], nil
		},
		func(i int, err error) {
			if err != nil {
				done(i, nil, err)
				return
			}
			n, err := parseNode(refs[i], raw[i])
			raw[i] = nil
			done(i, n, err)
		})
}
