package restore

import (
	"context"
	"fmt"
	"iter"
)

// Layer is a run of bytes and where they come from.
type Layer struct {
	Off int64 // bytes from the start of the disk
	Len int64 // bytes, never 0
	// Depth is 1 for what lies in the disk itself, 2 for what lies in the disk
	// below it, and so on; 0 for what lies nowhere and reads as zeroes.
	Depth int
}

// Layered is implemented by disks that lie on others.
type Layered interface {
	// Layers is as Extents, but tells which layer provides the bytes.
	Layers(ctx context.Context, off, n int64) iter.Seq2[Layer, error]
}

var _ Layered = (*Overlay)(nil)

// Layers tells where the bytes of [off, off+n) of any disk come from. What is no
// [Layered] is one layer of its data.
func Layers(ctx context.Context, d Disk, off, n int64) iter.Seq2[Layer, error] {
	if l, ok := d.(Layered); ok {
		return l.Layers(ctx, off, n)
	}
	return func(yield func(Layer, error) bool) {
		for e, err := range d.Extents(ctx, off, n) {
			l := Layer{Off: e.Off, Len: e.Len}
			if !e.Zero {
				l.Depth = 1
			}
			if !yield(l, err) || err != nil {
				return
			}
		}
	}
}

// Layers implements [Layered]: what was written, zeroed or trimmed is of the first
// layer.
func (o *Overlay) Layers(ctx context.Context, off, n int64) iter.Seq2[Layer, error] {
	return func(yield func(Layer, error) bool) {
		at, to, err := extentSpan(off, n, o.shape.size)
		if err != nil {
			yield(Layer{}, err)
			return
		}
		for at < to {
			if err := ctx.Err(); err != nil {
				yield(Layer{}, err)
				return
			}
			set, endBlock := o.bits.run(at/overlayBlock, (to+overlayBlock-1)/overlayBlock)
			end := min(endBlock*overlayBlock, to)
			if set {
				if !yield(Layer{Off: at, Len: end - at, Depth: 1}, nil) {
					return
				}
			} else if !o.baseLayers(ctx, at, end, yield) {
				return
			}
			at = end
		}
	}
}

// baseLayers yields the layers of the base for [from, to), one deeper. It returns
// false when the sequence is over.
func (o *Overlay) baseLayers(ctx context.Context, from, to int64, yield func(Layer, error) bool) bool {
	for l, err := range Layers(ctx, o.base, from, to-from) {
		if err != nil {
			yield(Layer{}, fmt.Errorf("overlay: %w", err))
			return false
		}
		if l.Depth > 0 {
			l.Depth++
		}
		if !yield(l, nil) {
			return false
		}
	}
	return true
}
