package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/tidemark/tidemark/store"
)

// written is what writing points took.
type written struct {
	Points  int
	Changed int64   // grains
	Seconds float64 // in all
	Median  float64 // of one point, in seconds
}

// grainAt is the disk's number of the i-th grain with data. Areas lie at equal distances, at
// whole nodes of the map.
func (o options) grainAt(i int64) int64 {
	step := o.Size / grain / int64(o.Areas) / areaGrains * areaGrains
	return i/areaGrains*step + i%areaGrains
}

func (o options) dataGrains() int64 { return int64(o.Areas) * areaGrains }

// content fills p with what grain i holds after the point given.
func (o options) content(p []byte, i int64, point int) {
	clear(p)
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(i)+1)
	binary.LittleEndian.PutUint64(seed[8:], uint64(point))
	_, _ = rand.NewChaCha8(seed).Read(p[:o.Stored]) // never fails
}

// changes returns the grains that a point after the first changes.
func (o options) changes(point int) []int64 {
	rnd := rand.New(rand.NewPCG(uint64(point), 7))
	out := make([]int64, o.Changes)
	for k := range out {
		out[k] = rnd.Int64N(o.dataGrains())
	}
	return out
}

// writePoints writes the first point, or all others.
func writePoints(ctx context.Context, o options) (w written, err error) {
	if o.phase == "full" {
		r, err := store.Init(ctx, o.location)
		if err != nil {
			return w, err
		}
		if err := r.Close(); err != nil {
			return w, err
		}
	}
	first, last := 0, 1
	if o.phase == "incremental" {
		first, last = 1, o.Points
	}
	var times []float64
	for point := first; point < last; point++ {
		begin := time.Now()
		n, err := writePoint(ctx, o, point)
		if err != nil {
			return w, fmt.Errorf("point %d: %w", point, err)
		}
		w.Changed += n
		w.Points++
		times = append(times, time.Since(begin).Seconds())
		w.Seconds += times[len(times)-1]
	}
	w.Median = median(times)
	return w, nil
}

// writePoint opens the repository anew, as each backup does.
func writePoint(ctx context.Context, o options, point int) (changed int64, err error) {
	r, err := store.Open(ctx, o.location)
	if err != nil {
		return 0, err
	}
	defer func() {
		if cerr := r.Close(); err == nil {
			err = cerr
		}
	}()
	w, err := r.Begin(ctx, vm)
	if err != nil {
		return 0, err
	}
	defer func() {
		if aerr := w.Abort(); err == nil {
			err = aerr
		}
	}()
	d, err := w.Disk(ctx, store.DiskOptions{Name: "disk0", Source: "synthetic", Size: o.Size, Grain: grain})
	if err != nil {
		return 0, err
	}
	p := make([]byte, grain)
	put := func(i int64) error {
		o.content(p, i, point)
		return d.Write(ctx, o.grainAt(i)*grain, p)
	}
	if point == 0 {
		for i := range o.dataGrains() {
			if err := put(i); err != nil {
				return 0, err
			}
		}
	}
	for _, i := range o.changes(point) {
		if point > 0 {
			if err := put(i); err != nil {
				return 0, err
			}
		}
	}
	pub, err := w.Commit(ctx, store.Point{
		Consistency: store.Crash, Quiesce: store.Quiesce{Method: "none"}, Tool: "scalebench",
		Disks: []store.Disk{{Name: "disk0", Tracking: store.Tracking{Mode: "tracked"}}},
	})
	if err != nil {
		return 0, err
	}
	return pub.Disks[0].Stats.Changed / grain, nil
}
