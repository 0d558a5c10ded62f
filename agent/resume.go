package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// DefaultCheckpoint is how long a backup works at least before it notes how far it has come.
const DefaultCheckpoint = time.Minute

// checkpointShare bounds what checkpoints cost: before the next one, at least this part of what is
// covered already is read.
const checkpointShare = 64

// takeUp makes the disk go on from a checkpoint of an interrupted backup. What was covered there needn't be
// read again, unless it may have changed since.
func (d *disk) takeUp(p *store.PartialDisk, made time.Time) {
	d.tracking = p.Tracking
	d.tracking.Reasons = slices.Clone(p.Tracking.Reasons)
	d.tracking.Evidence, d.tracking.Resumed = nil, made
	d.read = p.Stats.Read
	// Neither is needed for safety: without an ID all is read again.
	d.at, _ = cbt.ParseChangeID(p.ChangeID)
	if json.Unmarshal(p.Tracking.Evidence, &d.evidence) != nil {
		d.evidence = nil
	}
	var covered cbt.Extents
	for _, c := range p.Covered {
		covered = append(covered, cbt.Extent(c))
	}
	d.pending = without(cbt.Whole(d.size), covered)
}

// fits tells whether the checkpoint is of this disk as it is now.
func (d *disk) fits(p *store.PartialDisk, grain int) bool {
	return p != nil && p.Root.Size == d.size && (grain == 0 || p.Root.Grain == grain)
}

// without returns what is in x and not in y.
func without(x, y cbt.Extents) cbt.Extents {
	var out cbt.Extents
	for _, e := range x {
		at, end := e.Off, e.Off+e.Len
		for len(y) > 0 && y[0].Off+y[0].Len <= at {
			y = y[1:]
		}
		for _, c := range y {
			if c.Off >= end {
				break
			}
			if c.Off > at {
				out = append(out, cbt.Extent{Off: at, Len: c.Off - at})
			}
			at = max(at, c.Off+c.Len)
		}
		if at < end {
			out = append(out, cbt.Extent{Off: at, Len: end - at})
		}
	}
	return out
}

// written collects what of a disk's pending extents has been stored. Safe for concurrent use.
type written struct {
	mu  sync.Mutex
	all cbt.Extents // not in order
}

func (w *written) add(off, n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, cbt.Extent{Off: off, Len: n})
}

// extents puts them in order and joins them.
func (w *written) extents() cbt.Extents {
	w.mu.Lock()
	defer w.mu.Unlock()
	slices.SortFunc(w.all, func(a, b cbt.Extent) int { return int(min(max(a.Off-b.Off, -1), 1)) })
	var out cbt.Extents
	for _, e := range w.all {
		if n := len(out); n > 0 && out[n-1].Off+out[n-1].Len == e.Off {
			out[n-1].Len += e.Len
			continue
		}
		out = append(out, e)
	}
	w.all = out
	return slices.Clone(out)
}

func (w *written) clear() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = nil
}

// checkpoints notes now and then how far a backup has come; nil never does.
type checkpoints struct {
	w     *store.Writer
	every time.Duration // never if negative

	busy  atomic.Bool
	fresh atomic.Int64 // bytes stored since the last one
	last  atomic.Int64 // when that was, in nanoseconds since the epoch
}

func newCheckpoints(w *store.Writer, every time.Duration) *checkpoints {
	if every == 0 {
		every = DefaultCheckpoint
	}
	k := &checkpoints{w: w, every: every}
	k.last.Store(time.Now().UnixNano())
	return k
}

// stored counts n bytes, and makes a checkpoint of the disks if it is time for one. One caller
// makes it, others wait when they write next. No epoch is swapped meanwhile.
func (k *checkpoints) stored(ctx context.Context, n int64, disks []*disk) error {
	if k == nil || k.every < 0 {
		return nil
	}
	fresh := k.fresh.Add(n)
	if time.Since(time.Unix(0, k.last.Load())) < k.every || !k.busy.CompareAndSwap(false, true) {
		return nil
	}
	defer k.busy.Store(false)
	var covered int64
	parts := make([]store.PartialDisk, 0, len(disks))
	for _, d := range disks {
		p, err := d.part()
		if err != nil {
			return err
		}
		for _, c := range p.Covered {
			covered += c.Len
		}
		parts = append(parts, p)
	}
	if fresh < covered/checkpointShare {
		k.last.Store(time.Now().UnixNano()) // don't ask again at once
		return nil
	}
	k.fresh.Store(0)
	err := k.w.Checkpoint(ctx, parts)
	k.last.Store(time.Now().UnixNano())
	if err != nil {
		return fmt.Errorf("note how far the backup has come: %w", err)
	}
	return nil
}

// part is the disk as far as it has been stored: all that is not pending, or was
// read since, is as it was when the epoch after d.at began, or newer.
func (d *disk) part() (store.PartialDisk, error) {
	done := d.written.extents()
	p := store.PartialDisk{
		Name: d.name, Tracking: d.tracking, Stats: store.Stats{Read: d.read + done.Bytes()},
	}
	if !d.at.IsZero() {
		p.ChangeID = d.at.String()
	}
	for _, e := range without(cbt.Whole(d.size), without(d.pending, done)) {
		p.Covered = append(p.Covered, store.Covered(e))
	}
	var err error
	p.Tracking.Evidence, err = json.Marshal(d.evidence)
	return p, err
}
