package store

import (
	"context"
	"fmt"
	"math/bits"
	"slices"
)

// rewritten tells whether leaves were written again after they had been sealed.
func (d *DiskWriter) rewritten() bool {
	for _, l := range d.leaves {
		if l.isSealed && l.set != 0 {
			return true
		}
	}
	return false
}

// build writes the map's new nodes, from the leaves up, and returns its root.
// Only nodes above written leaves are made; all others are the parent's. No write
// may run.
func (d *DiskWriter) build(ctx context.Context) (Root, error) {
	keys := make([]int64, 0, len(d.leaves))
	for k := range d.leaves {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	if l := d.leaves[d.cutAt>>fanOutBits]; d.cutAt >= 0 && !l.isSealed && l.set&(1<<(d.cutAt&(fanOut-1))) == 0 {
		return Root{}, fmt.Errorf("%w: the disk shrank, and its last grain was not written", ErrWriterKey)
	}

	top := int(d.shape.Level)
	base := subtree{level: top}
	if d.parent != nil {
		base = subtree{d.parent.root.Ref, int(d.parent.root.Level)}
	}
	for base.level > top { // the disk shrank: the rest lies beyond the end
		children, err := base.children(ctx, d.w.repo.reader, base.level)
		if err != nil {
			return Root{}, err
		}
		base = children(0)
	}
	root := d.shape
	var err error
	root.Ref, err = d.buildNode(ctx, top, 0, base, keys)
	return root, err
}

// buildNode makes the node whose first grain is first. keys are the leaves written
// below it.
func (d *DiskWriter) buildNode(ctx context.Context, level int, first int64, base subtree, keys []int64) (Ref, error) {
	if base.ref.IsZero() && len(keys) == 0 {
		return Ref{}, nil
	}
	if base.level == level && len(keys) == 0 {
		return base.ref, nil
	}
	if err := ctx.Err(); err != nil {
		return Ref{}, err
	}
	if level == 0 {
		return d.buildLeaf(ctx, first>>fanOutBits, base)
	}
	// A base that cannot be read is not needed if all below is new.
	if base.level == level && d.covers(level, first, keys) {
		base = subtree{level: level}
	}
	old, err := base.children(ctx, d.w.repo.reader, level)
	if err != nil {
		return Ref{}, err
	}
	var children [fanOut]Ref
	for i := range fanOut {
		at := first + int64(i)*span(level)
		if at >= d.shape.grains() {
			break // also cuts what a larger parent has there
		}
		below := len(keys)
		if limit := (at + span(level)) >> fanOutBits; len(keys) > 0 && keys[len(keys)-1] >= limit {
			below, _ = slices.BinarySearch(keys, limit)
		}
		if children[i], err = d.buildNode(ctx, level-1, at, old(i), keys[:below]); err != nil {
			return Ref{}, err
		}
		keys = keys[below:]
	}
	return d.putNode(ctx, level, &children, d.same(base, level))
}

// same is the node that need not be written again if it comes out equal.
func (d *DiskWriter) same(base subtree, level int) Ref {
	if base.level != level {
		return Ref{}
	}
	return base.ref
}

// covers tells whether every leaf below a node was written as a whole.
func (d *DiskWriter) covers(level int, first int64, keys []int64) bool {
	leaves := (min(first+fanOut*span(level), d.shape.grains()) - first + fanOut - 1) >> fanOutBits
	if int64(len(keys)) != leaves {
		return false
	}
	return !slices.ContainsFunc(keys, func(k int64) bool { return !d.leaves[k].isSealed })
}

// buildLeaf lays what was written over the sealed or the parent's leaf.
func (d *DiskWriter) buildLeaf(ctx context.Context, i int64, base subtree) (Ref, error) {
	l := d.leaves[i]
	if l.isSealed {
		if l.set == 0 {
			return l.sealed, nil
		}
		base.ref = l.sealed
	}
	var children [fanOut]Ref
	if !base.ref.IsZero() && l.set != d.validMask(i) {
		n, err := d.w.repo.node(ctx, base.ref, 0)
		if err != nil {
			return Ref{}, err
		}
		for b := range bits.Len64(d.validMask(i)) {
			children[b] = n.child(b)
		}
	}
	refs := l.refs
	for b := range fanOut {
		if l.set&(1<<b) != 0 {
			children[b], refs = refs[0], refs[1:]
		}
	}
	return d.putNode(ctx, 0, &children, d.same(base, 0))
}
