package restore

import (
	"bytes"
	"context"
	"testing"

	"github.com/tidemark/tidemark/store"
)

// brokenMap is a disk whose map can't be followed from the grain at broken on.
type brokenMap struct {
	*numberedGrains
	broken int64
}

func (s brokenMap) Refs(ctx context.Context, from int64, dst []store.Ref) error {
	if from+int64(len(dst)) > s.broken {
		return store.ErrCorrupt
	}
	return s.numberedGrains.Refs(ctx, from, dst)
}

// A reader that takes a queued span over must not meet damage of what it has not asked for.
func TestTakenOverSpanDoesNotSpreadDamage(t *testing.T) {
	const broken = 100
	s := brokenMap{&numberedGrains{}, broken}
	d := newPointDisk(s, store.Root{Size: 1000 * testGrain, Grain: testGrain}, "disk0", NewCache(64<<20))
	t.Cleanup(func() { _ = d.Close() })
	d.ahead.queue = []grainSpan{{broken - 10, broken + 10}} // as if all loaders were busy
	p := make([]byte, testGrain)
	if _, err := d.ReadAt(p, (broken-1)*testGrain); err != nil || !bytes.Equal(p, numbered(broken-1)) {
		t.Errorf("a grain that is whole: %v", err)
	}
	if _, err := d.ReadAt(p, broken*testGrain); err == nil {
		t.Error("a grain that is lost was read")
	}
}
