package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestCollectionsBesideEverybody runs writers, forgetters, readers and several garbage
// collections on one repository without locks, with random delays at every operation
// on an object. No point may ever lose anything, and in the end no garbage may be
// left. TIDEMARK_GC_SEEDS says how many runs.
func TestCollectionsBesideEverybody(t *testing.T) {
	t.Parallel()
	seeds := 12
	if s := os.Getenv("TIDEMARK_GC_SEEDS"); s != "" {
		var err error
		if seeds, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	first := uint64(time.Now().UnixNano())
	if s := os.Getenv("TIDEMARK_GC_SEED"); s != "" {
		var err error
		if first, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	for i := range seeds {
		seed := first + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newCrowd(t, seed).run() })
		})
		if t.Failed() {
			return
		}
	}
}

const (
	crowdGrain  = 4096
	crowdGrains = 130 // three leaves, two levels
	crowdGrace  = 3 * time.Minute
)

// crowd is one repository and all who use it.
type crowd struct {
	t    *testing.T
	m    *memStore
	repo *Repo // for looking, not shared by the actors

	mu        sync.Mutex
	images    map[PointName][]byte // acknowledged
	forgotten map[PointName]bool
	counts    map[string]int
}

func newCrowd(t *testing.T, seed uint64) *crowd {
	c := &crowd{t: t, m: newMemStore(seed), images: map[PointName][]byte{}, forgotten: map[PointName]bool{}, counts: map[string]int{}}
	c.m.be(true)
	var err error
	if c.repo, err = initOn(t.Context(), c.m, "mem", testNew()...); err != nil {
		t.Fatal(err)
	}
	c.m.be(false)
	return c
}

// open returns a repository with caches of its own, as another process has.
func (c *crowd) open() *Repo {
	r, err := openOn(c.t.Context(), c.m, "mem", testKey()...)
	if err != nil {
		c.t.Fatal(err)
	}
	r.dataPackLen, r.nodePackLen = 20<<10, 1<<10
	return r
}

func (c *crowd) count(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[what]++
}

func (c *crowd) run() {
	var busy sync.WaitGroup
	stop := make(chan struct{})
	for _, vm := range []string{"a", "a", "b", "c"} {
		busy.Go(func() { c.write(vm, c.rand()) })
	}
	var rest sync.WaitGroup
	for range 3 {
		rest.Go(func() { c.collect(stop) })
	}
	for range 2 {
		rest.Go(func() { c.forget(stop) })
		rest.Go(func() { c.read(stop) })
	}
	busy.Wait()
	close(stop)
	rest.Wait()
	c.checkAll()
	c.settle()
	c.checkAll()
	c.t.Log(c.counts)
}

func (c *crowd) rand() *rand.Rand {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	return rand.New(rand.NewPCG(c.m.rnd.Uint64(), 3))
}

// write makes points whose content comes from a small stock, so that what was
// garbage a moment ago is wanted again.
func (c *crowd) write(vm string, rnd *rand.Rand) {
	r := c.open()
	for range 25 {
		time.Sleep(time.Duration(rnd.IntN(2000)) * time.Millisecond)
		if rnd.IntN(3) == 0 {
			r = c.open()
		}
		n, image, err := c.backup(r, vm, rnd)
		switch {
		case errors.Is(err, ErrGivenUp):
			c.count("given up")
		case errors.Is(err, errCrowdAbort):
			c.count("aborted")
		case errors.Is(err, ErrLocked): // the other writer of this VM was faster
			c.count("rivals")
		case err != nil:
			c.t.Errorf("backup: %v", err)
		default:
			c.mu.Lock()
			c.images[n] = image
			c.mu.Unlock()
			c.count("points")
		}
	}
}

var errCrowdAbort = errors.New("aborted")

func (c *crowd) backup(r *Repo, vm string, rnd *rand.Rand) (PointName, []byte, error) {
	ctx := c.t.Context()
	w, err := r.Begin(ctx, vm)
	if err != nil {
		return PointName{}, nil, err
	}
	defer func() { _ = w.Abort() }()
	image := make([]byte, crowdGrain*crowdGrains)
	if p := w.Parent(); p != nil {
		c.mu.Lock()
		image = slices.Clone(c.images[p.Name()])
		c.mu.Unlock()
		if image == nil { // it was published and is not acknowledged yet
			if image, err = readDisk(ctx, r, p.Disks[0].Root); err != nil {
				return PointName{}, nil, fmt.Errorf("read the parent: %w", err)
			}
		}
	}
	d, err := w.Disk(ctx, DiskOptions{Name: "disk0", Size: int64(len(image)), Grain: crowdGrain, Dedup: rnd.IntN(4) > 0})
	if err != nil {
		return PointName{}, nil, err
	}
	for range 1 + rnd.IntN(5) {
		g, b := rnd.IntN(crowdGrains), noise(uint64(rnd.IntN(12)), crowdGrain)
		if rnd.IntN(6) == 0 {
			clear(b)
		}
		copy(image[g*crowdGrain:], b)
		if err := d.Write(ctx, int64(g)*crowdGrain, b); err != nil {
			return PointName{}, nil, err
		}
		time.Sleep(time.Duration(rnd.IntN(200)) * time.Millisecond)
	}
	if rnd.IntN(8) == 0 {
		return PointName{}, nil, errCrowdAbort
	}
	p, err := w.Commit(ctx, testPoint("disk0"))
	if err != nil {
		return PointName{}, nil, err
	}
	return p.Name(), image, nil
}

func (c *crowd) collect(stop <-chan struct{}) {
	rnd := c.rand()
	for !stopped(stop) {
		o := GCOptions{Garbage: 0.01, grace: crowdGrace}
		switch rnd.IntN(4) {
		case 0:
			o.Patience = time.Duration(200+rnd.IntN(3000)) * time.Millisecond
		case 1, 2:
			o.Wait = time.Duration(rnd.IntN(60)) * time.Second
		}
		rep, err := c.open().GC(c.t.Context(), o)
		if err != nil {
			c.t.Errorf("gc: %v", err)
			return
		}
		if len(rep.Damaged) > 0 {
			c.t.Errorf("gc: %v", rep.Damaged)
		}
		c.mu.Lock()
		c.counts["gc"]++
		c.counts["deleted"] += int(rep.Deleted)
		c.counts["compacted"] += int(rep.Compacted)
		c.mu.Unlock()
		switch rnd.IntN(15) {
		case 0:
			time.Sleep(crowdGrace)
		case 1, 2, 3:
			time.Sleep(time.Duration(rnd.IntN(20)) * time.Second)
		}
	}
}

func (c *crowd) forget(stop <-chan struct{}) {
	rnd, r := c.rand(), c.open()
	for !stopped(stop) {
		time.Sleep(time.Duration(rnd.IntN(1500)) * time.Millisecond)
		vm := string("abc"[rnd.IntN(3)])
		names, err := r.Points(c.t.Context(), vm)
		if err != nil {
			c.t.Error(err)
			return
		}
		if len(names) < 2 && rnd.IntN(4) > 0 || len(names) == 0 {
			continue
		}
		n := names[rnd.IntN(len(names))]
		c.mu.Lock()
		c.forgotten[n] = true
		c.counts["forgotten"]++
		c.mu.Unlock()
		if err := c.m.Delete(c.t.Context(), c.repo.pointObject(n)); err != nil && !errors.Is(err, ErrNotFound) {
			c.t.Error(err)
		}
	}
}

func stopped(stop <-chan struct{}) bool {
	select {
	case <-stop:
		return true
	default:
		return false
	}
}

func (c *crowd) read(stop <-chan struct{}) {
	rnd, r := c.rand(), c.open()
	for !stopped(stop) {
		time.Sleep(time.Duration(rnd.IntN(1000)) * time.Millisecond)
		c.mu.Lock()
		names := slices.Collect(maps.Keys(c.images))
		c.mu.Unlock()
		if len(names) == 0 {
			continue
		}
		if rnd.IntN(4) == 0 {
			r = c.open()
		}
		c.check(r, names[rnd.IntN(len(names))])
	}
}

// check reads a point, which must be what was acknowledged, unless it is forgotten.
func (c *crowd) check(r *Repo, n PointName) {
	err := func() error {
		p, err := r.Point(c.t.Context(), n)
		if err != nil {
			return err
		}
		got, err := readDisk(context.Background(), r, p.Disks[0].Root)
		if err == nil && !bytes.Equal(got, c.image(n)) {
			err = fmt.Errorf("it differs at byte %d", firstDiff(got, c.image(n)))
		}
		return err
	}()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts["read"]++
	if err != nil && !c.forgotten[n] {
		c.t.Errorf("%s: %v", n, err)
	}
}

func (c *crowd) image(n PointName) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.images[n]
}

// checkAll looks at every point that is listed, acknowledged or not, and at all that
// were acknowledged.
func (c *crowd) checkAll() {
	c.m.be(true)
	defer c.m.be(false)
	r := c.open()
	names, err := r.allPoints(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	for _, n := range names {
		p, err := r.Point(c.t.Context(), n)
		if err != nil {
			c.t.Fatal(err)
		}
		wantClean(c.t, r, p)
	}
	for n := range c.images {
		if !slices.Contains(names, n) && !c.forgotten[n] {
			c.t.Errorf("%s is lost", n)
		}
		c.check(r, n)
	}
}

// settle lets everything end, and looks that no garbage is left.
func (c *crowd) settle() {
	c.m.be(true)
	for range 3 {
		time.Sleep(crowdGrace + keepFence)
		if _, err := c.open().GC(c.t.Context(), GCOptions{Garbage: 0.0001, Patience: time.Second, grace: crowdGrace}); err != nil {
			c.t.Errorf("last gc: %v", err)
		}
	}
	rep, err := c.open().GC(c.t.Context(), GCOptions{DryRun: true})
	if err != nil || rep.Garbage != 0 {
		c.t.Errorf("garbage is left: %+v, %v", rep, err)
	}
	if left := append(c.m.names(sessionPrefix), c.m.names(gcPrefix)...); len(left) > 0 {
		c.t.Errorf("left behind: %v", left)
	}
}
