package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/store"
)

// counted is what a step asked of the storage, and how long it took.
type counted struct {
	Requests, Bytes float64 // per operation
	Median, P99     float64 // microseconds
}

// reading is what one point costs to read.
type reading struct {
	Point  int
	Open   counted // repository, list of points, document
	First  counted // a read with all caches empty
	Early  counted // random reads after that
	Steady counted // and when the map and most indexes are in memory
	Wrong  int     // reads that gave other bytes than were written
}

// steps times operations between two looks at a meter.
type steps struct {
	m     *meter
	req   int64
	bytes int64
	times []float64
}

func (m *meter) begin() *steps { return &steps{m: m, req: m.requests.Load(), bytes: m.bytes.Load()} }

func (s *steps) time(f func() error) error {
	begin := time.Now()
	err := f()
	s.times = append(s.times, float64(time.Since(begin).Nanoseconds())/1000)
	return err
}

func (s *steps) end() counted {
	n := float64(len(s.times))
	slices.Sort(s.times)
	return counted{
		Requests: float64(s.m.requests.Load()-s.req) / n, Bytes: float64(s.m.bytes.Load()-s.bytes) / n,
		Median: s.times[len(s.times)/2], P99: s.times[len(s.times)*99/100],
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	if len(v) == 0 {
		return 0
	}
	return v[len(v)/2]
}

// firsts is how often opening and the first read are measured.
const firsts = 21

// readPoint measures one point. Bytes are compared with what was written.
func readPoint(ctx context.Context, o options) (r reading, err error) {
	r.Point = o.point
	m, err := o.meter(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	last := o.lastChange()
	rnd := rand.New(rand.NewPCG(1, uint64(o.point)))
	want, got := make([]byte, grain), make([]byte, 4096)
	read := func(d *restore.PointDisk, s *steps) error {
		i := rnd.Int64N(o.dataGrains())
		at := rnd.Int64N(grain/4096) * 4096
		if err := s.time(func() error { _, err := d.ReadAt(got, o.grainAt(i)*grain+at); return err }); err != nil {
			return err
		}
		o.content(want, i, last[i])
		if string(got) != string(want[at:at+4096]) {
			r.Wrong++
		}
		return nil
	}
	opens, reads := m.begin(), m.begin()
	var openRequests, openBytes int64
	for range firsts {
		if err := dropCaches(o.Dir); err != nil {
			return r, err
		}
		req, bytes := m.requests.Load(), m.bytes.Load()
		var d *restore.PointDisk
		var closeAll func() error
		if err := opens.time(func() error { d, closeAll, err = o.open(ctx, m); return err }); err != nil {
			return r, err
		}
		openRequests += m.requests.Load() - req
		openBytes += m.bytes.Load() - bytes
		if err := errors.Join(read(d, reads), closeAll()); err != nil {
			return r, err
		}
	}
	// Both meters ran over all of it: take apart what belongs to which.
	r.Open, r.First = opens.end(), reads.end()
	r.First.Requests -= float64(openRequests) / firsts
	r.First.Bytes -= float64(openBytes) / firsts
	r.Open.Requests, r.Open.Bytes = float64(openRequests)/firsts, float64(openBytes)/firsts

	d, closeAll, err := o.open(ctx, m)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	series := func() (counted, error) {
		s := m.begin()
		for range o.Reads {
			if err := read(d, s); err != nil {
				return counted{}, err
			}
		}
		return s.end(), nil
	}
	if r.Early, err = series(); err != nil {
		return r, err
	}
	for _, err := range d.Extents(ctx, 0, d.Size()) { // reads the whole map
		if err != nil {
			return r, err
		}
	}
	for range 5 { // the last one counts
		if r.Steady, err = series(); err != nil {
			return r, err
		}
	}
	return r, nil
}

// lastChange tells for each grain with data the newest point, up to the one that is read,
// that changed it.
func (o options) lastChange() []int {
	last := make([]int, o.dataGrains())
	for point := 1; point <= o.point; point++ {
		for _, i := range o.changes(point) {
			last[i] = point
		}
	}
	return last
}

// open opens the repository and the point as a mount or an export would.
func (o options) open(ctx context.Context, m *meter) (*restore.PointDisk, func() error, error) {
	repo, err := store.OpenIn(ctx, keepOpen{m}, o.location)
	if err != nil {
		return nil, nil, err
	}
	names, err := repo.Points(ctx, vm)
	if err != nil {
		return nil, nil, errors.Join(err, repo.Close())
	}
	if len(names) <= o.point {
		return nil, nil, errors.Join(fmt.Errorf("%d points, not %d", len(names), o.point+1), repo.Close())
	}
	p, err := repo.Point(ctx, names[o.point])
	if err != nil {
		return nil, nil, errors.Join(err, repo.Close())
	}
	// Too small to keep grains that are read again: each read is of a new one.
	d, err := restore.OpenPoint(repo, p, 0, restore.NewCache(1<<20))
	if err != nil {
		return nil, nil, errors.Join(err, repo.Close())
	}
	return d, func() error { return errors.Join(d.Close(), repo.Close()) }, nil
}

// keepOpen is used by one repository after the other.
type keepOpen struct{ *meter }

func (keepOpen) Close() error { return nil }

// dropCaches has the kernel forget what it keeps of the repository's files.
func dropCaches(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
	})
}
