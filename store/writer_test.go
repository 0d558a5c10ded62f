package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const k64 = 64 << 10

func TestFirstAndSecondPoint(t *testing.T) {
	r := testRepo(t)
	image := make([]byte, 10<<20+1000)
	copy(image[3<<20:], noise(1, 1<<20))
	tail := noise(2, 1000)
	copy(image[10<<20:], tail)
	p1 := backup(t, r, DiskOptions{Size: int64(len(image)), Source: "/dev/x"}, write{0, image})
	if s := p1.Disks[0].Stats; s.Changed != 1<<20+1000 || s.New != 17*k64 || s.Stored < s.Changed {
		t.Errorf("stats of the first point: %+v", s)
	}
	wantDisk(t, r, p1, image)

	second := slices.Clone(image)
	copy(second[8<<20:], noise(3, k64))
	clear(second[3<<20 : 3<<20+k64])
	p2 := backup(t, r, DiskOptions{Size: int64(len(image))}, write{8 << 20, second[8<<20 : 8<<20+k64]}, write{3 << 20, second[3<<20 : 3<<20+k64]})
	if s := p2.Disks[0].Stats; s.Changed != 2*k64 || s.New != k64 {
		t.Errorf("stats of the second point: %+v", s)
	}
	if p2.Parent != p1.ID || p1.Parent != "" || !p2.Time.After(p1.Time) {
		t.Errorf("parents %q, %q; times %v, %v", p1.Parent, p2.Parent, p1.Time, p2.Time)
	}
	r = reopen(t, r)
	wantDisk(t, r, p2, second)
	wantDisk(t, r, p1, image)
	wantClean(t, r, p1)
	wantClean(t, r, p2)
	got, err := r.Point(t.Context(), p1.Name())
	if err != nil || got.Disks[0].Source != "/dev/x" || got.Disks[0].ChangeID != "c" || got.Disks[0].Root != p1.Disks[0].Root {
		t.Errorf("read back: %+v, %v", got, err)
	}
}

func TestUnwrittenDiskStoresNothing(t *testing.T) {
	r := testRepo(t)
	f := over(r)
	p := backup(t, r, DiskOptions{Size: 100 << 30}, write{0, make([]byte, 1<<20)})
	if !p.Disks[0].Root.Ref.IsZero() || f.total("put:packs") != 0 {
		t.Errorf("root %+v, %d packs", p.Disks[0].Root, f.total("put:packs"))
	}
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	for run, err := range m.Runs(t.Context(), 0, m.Grains()) {
		if want := (Run{0, m.Grains(), true}); err != nil || run != want {
			t.Errorf("run %+v, %v", run, err)
		}
	}
}

func TestIncrementalWritesOnlyChangedPath(t *testing.T) {
	r := testRepo(t)
	size := int64(8 << 30) // three levels
	first := make([]write, 0, 40)
	for i := range int64(40) {
		first = append(first, write{i * 200 << 20, noise(uint64(i), k64)})
	}
	backup(t, r, DiskOptions{Size: size}, first...)
	p := backup(t, r, DiskOptions{Size: size}, write{600 << 20, text(99, k64)})
	if s := p.Disks[0].Stats; s.Stored > 12<<10 {
		t.Errorf("one changed grain stored %d bytes", s.Stored)
	}
	same := backup(t, r, DiskOptions{Size: size}, write{600 << 20, text(99, k64)})
	if s := same.Disks[0].Stats; s != (Stats{}) {
		t.Errorf("nothing changed, and yet %+v", s)
	}
	if same.Disks[0].Root != p.Disks[0].Root {
		t.Error("the root changed without a change")
	}
}

func TestWriteBackToParentsContentIsNoChange(t *testing.T) {
	r := testRepo(t)
	image := noise(1, 8<<20)
	p1 := backup(t, r, DiskOptions{Size: 8 << 20}, write{0, image})
	p2 := backup(t, r, DiskOptions{Size: 8 << 20}, write{0, noise(2, 8<<20)}, write{0, image})
	if s := p2.Disks[0].Stats; s.Changed != 0 {
		t.Errorf("Changed = %d", s.Changed)
	}
	wantDisk(t, r, p2, image)
	m1, _ := r.Map(p1.Disks[0].Root)
	m2, _ := r.Map(p2.Disks[0].Root)
	for run, err := range m2.Diff(t.Context(), m1, 0, m2.Grains()) {
		t.Errorf("diff %+v, %v", run, err)
	}
}

func TestSameContentIsStoredOnce(t *testing.T) {
	r := testRepo(t)
	one := noise(1, k64)
	p := backup(t, r, DiskOptions{Size: 64 << 20}, write{0, bytes.Repeat(one, 1000)})
	if s := p.Disks[0].Stats; s.New != k64 || s.Changed != 1000*k64 {
		t.Errorf("stats %+v", s)
	}
	wantClean(t, r, p)
}

func TestSameContentConcurrentlyIsStoredOnce(t *testing.T) {
	r := testRepo(t)
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	const n = 16
	for round := range 8 {
		start := make(chan struct{})
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				<-start
				if err := d.Write(t.Context(), int64(round*n+i)*k64, noise(uint64(round), k64)); err != nil {
					t.Error(err)
				}
			})
		}
		close(start)
		wg.Wait()
	}
	if got := d.Stats().New; got != 8*k64 {
		t.Errorf("New = %d grains, want 8", got/k64)
	}
}

func TestConcurrentWritesOfDisjointRanges(t *testing.T) {
	r := testRepo(t)
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	const size = 24<<20 + 12345
	image := noise(7, size)
	clear(image[5<<20 : 9<<20])
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: size})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for off := i * k64; off < size; off += 4 * k64 {
				for _, p := range [][]byte{text(1, min(k64, size-off)), image[off:min(off+k64, size)]} {
					if err := d.Write(t.Context(), int64(off), p); err != nil {
						t.Error(err)
					}
				}
				_ = d.Stats()
			}
		})
	}
	wg.Wait()
	p, err := w.Commit(t.Context(), testPoint("disk0"))
	if err != nil {
		t.Fatal(err)
	}
	wantDisk(t, r, p, image)
	wantClean(t, reopen(t, r), p)
}

func TestDedupFindsGrainsOfOtherPlacesAndVMs(t *testing.T) {
	r := testRepo(t)
	backup(t, r, DiskOptions{Size: 4 << 20}, write{0, noise(1, 1<<20)})
	for _, dedup := range []bool{false, true} {
		w, err := r.Begin(t.Context(), fmt.Sprintf("other-%v", dedup))
		if err != nil {
			t.Fatal(err)
		}
		d, err := w.Disk(t.Context(), DiskOptions{Name: "root", Size: 4 << 20, Dedup: dedup})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Write(t.Context(), 2<<20, noise(1, 1<<20)); err != nil {
			t.Fatal(err)
		}
		p, err := w.Commit(t.Context(), testPoint("root"))
		if err != nil {
			t.Fatal(err)
		}
		if found := p.Disks[0].Stats.New == 0; found != dedup {
			t.Errorf("dedup %v: New = %d", dedup, p.Disks[0].Stats.New)
		}
		wantClean(t, r, p)
	}
}

func TestSessionForgetsOldestGeneration(t *testing.T) {
	s := newSession(new(share))
	s.limit = 10
	put := func(i byte) (stored bool) {
		_, err := s.once(t.Context(), Hash{i}, func() (Ref, error) {
			stored = true
			return Ref{Hash: Hash{i}, Pack: PackID{1}, Ord: uint32(i)}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return stored
	}
	for i := range byte(15) {
		put(i + 1)
	}
	if put(15) || put(3) {
		t.Error("a recent grain was forgotten")
	}
	for i := range byte(40) {
		put(i + 100)
	}
	if !put(8) {
		t.Error("an old grain was never forgotten")
	}
	if len(s.young)+len(s.old) > 2*s.limit {
		t.Errorf("%d grains remembered", len(s.young)+len(s.old))
	}
}

func TestSessionRetriesAfterAnothersCancellation(t *testing.T) {
	s := newSession(new(share))
	started, fail := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := s.once(t.Context(), Hash{1}, func() (Ref, error) {
			close(started)
			<-fail
			return Ref{}, context.Canceled
		})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	<-started
	wg.Go(func() {
		want := Ref{Hash: Hash{1}, Ord: 7}
		got, err := s.once(t.Context(), Hash{1}, func() (Ref, error) { return want, nil })
		if err != nil || got != want {
			t.Errorf("%+v, %v", got, err)
		}
	})
	close(fail)
	wg.Wait()
}

func TestSecondWriterIsLockedOut(t *testing.T) {
	r := testRepo(t)
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := reopen(t, r).Begin(t.Context(), "a"); !errors.Is(err, ErrLocked) {
		t.Errorf("second Begin: %v", err)
	}
	other, err := r.Begin(t.Context(), "b")
	if err != nil {
		t.Fatalf("Begin of another VM: %v", err)
	}
	if err := errors.Join(other.Abort(), w.Abort(), w.Abort()); err != nil {
		t.Fatal(err)
	}
	w, err = r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatalf("Begin after Abort: %v", err)
	}
	if _, err := w.Disk(t.Context(), DiskOptions{Name: "d", Size: k64}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), testPoint("d")); err != nil {
		t.Fatal(err)
	}
	next, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatalf("Begin after Commit: %v", err)
	}
	if err := w.Abort(); err != nil { // must not release the new lock
		t.Error(err)
	}
	if _, err := r.Begin(t.Context(), "a"); !errors.Is(err, ErrLocked) {
		t.Errorf("Begin beside the new writer: %v", err)
	}
	_ = next.Abort()
}

func TestAbortLeavesNothingToSee(t *testing.T) {
	r := testRepo(t)
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), 0, noise(1, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := w.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), 0, noise(1, k64)); !errors.Is(err, ErrInvalid) {
		t.Errorf("Write after Abort: %v", err)
	}
	if _, err := w.Commit(t.Context(), testPoint("disk0")); err == nil {
		t.Error("Commit after Abort succeeded")
	}
	vms, err := r.VMs(t.Context())
	if err != nil || len(vms) != 0 {
		t.Errorf("VMs: %v, %v", vms, err)
	}
}

func TestClockGoingBackKeepsOrder(t *testing.T) {
	r := testRepo(t)
	at := time.Date(2030, 1, 2, 3, 4, 5, 6, time.UTC)
	var last *Point
	for i, when := range []time.Time{at, at, at.Add(-time.Hour), at.Add(time.Hour)} {
		w, err := r.Begin(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		if got := w.Parent(); last != nil && (got == nil || got.ID != last.ID) {
			t.Fatalf("parent %v, want %v", got, last.ID)
		}
		if _, err := w.Disk(t.Context(), DiskOptions{Name: "d", Size: k64}); err != nil {
			t.Fatal(err)
		}
		p := testPoint("d")
		p.Time = when
		pub, err := w.Commit(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if last != nil && !pub.Time.After(last.Time) {
			t.Errorf("point %d at %v is not after %v", i, pub.Time, last.Time)
		}
		last = pub
	}
	if !last.Time.Equal(at.Add(time.Hour)) {
		t.Errorf("a good time was changed to %v", last.Time)
	}
}

func TestOtherGrainBeginsEmpty(t *testing.T) {
	r := testRepo(t)
	backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, 1<<20)})
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	for name, tt := range map[string]struct {
		o    DiskOptions
		want bool
	}{
		"same":  {DiskOptions{Name: "disk0", Size: 1 << 20}, true},
		"grain": {DiskOptions{Name: "disk0", Size: 1 << 20, Grain: 4096}, false},
		"fresh": {DiskOptions{Name: "disk0", Size: 1 << 20, Fresh: true}, false},
		"name":  {DiskOptions{Name: "disk1", Size: 1 << 20}, false},
		"grown": {DiskOptions{Name: "disk0", Size: 3 << 20}, true},
	} {
		clear(w.disks)
		d, err := w.Disk(t.Context(), tt.o)
		if err != nil || d.HasParent() != tt.want {
			t.Errorf("%s: HasParent %v, %v", name, d.HasParent(), err)
		}
	}
}

func TestShrunkDiskForgetsWhatWasBeyond(t *testing.T) {
	r := testRepo(t)
	const big, small = 20 << 20, 5<<20 + 100
	image := noise(1, big)
	o := DiskOptions{Size: big, Grain: 4096}
	backup(t, r, o, write{0, image})
	o.Size = small
	cutDisk := backup(t, r, o)
	wantDisk(t, r, cutDisk, image[:small])
	wantClean(t, r, cutDisk)
	o.Size = big
	grown := backup(t, r, o)
	clear(image[small:])
	wantDisk(t, r, grown, image)
	wantClean(t, r, grown)
	o.Size = 2 << 30 // more levels
	huge := backup(t, r, o)
	wantClean(t, r, huge)
	m, err := r.Map(huge.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	var runs []Run
	for run, err := range m.Runs(t.Context(), 0, m.Grains()) {
		if err != nil {
			t.Fatal(err)
		}
		runs = append(runs, run)
	}
	data := int64(small/4096 + 1)
	if want := []Run{{0, data, false}, {data, m.Grains(), true}}; !slices.Equal(runs, want) {
		t.Errorf("runs %+v, want %+v", runs, want)
	}
}

func TestInvalidCalls(t *testing.T) {
	r := testRepo(t)
	if _, err := r.Begin(t.Context(), "../x"); !errors.Is(err, ErrInvalid) {
		t.Errorf("Begin: %v", err)
	}
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	for _, o := range []DiskOptions{
		{Name: "", Size: k64}, {Name: "a/b", Size: k64}, {Name: "d"}, {Name: "d", Size: -1},
		{Name: "d", Size: k64, Grain: 1000}, {Name: "d", Size: k64, Grain: 2 << 20}, {Name: "d", Size: k64, Grain: 2048}, {Name: "d", Size: 1 << 62},
	} {
		if _, err := w.Disk(t.Context(), o); !errors.Is(err, ErrInvalid) {
			t.Errorf("Disk(%+v): %v", o, err)
		}
	}
	d, err := w.Disk(t.Context(), DiskOptions{Name: "d", Size: 3*k64 + 10})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Disk(t.Context(), DiskOptions{Name: "d", Size: k64}); !errors.Is(err, ErrInvalid) {
		t.Errorf("the same disk twice: %v", err)
	}
	for _, x := range []struct {
		off int64
		n   int
	}{{-k64, k64}, {1, k64}, {0, 10}, {3 * k64, 9}, {3 * k64, 11}, {4 * k64, 0}, {2 * k64, 2 * k64}, {1 << 62, k64}} {
		if err := d.Write(t.Context(), x.off, make([]byte, x.n)); !errors.Is(err, ErrInvalid) {
			t.Errorf("Write(%d, %d bytes): %v", x.off, x.n, err)
		}
	}
	if err := d.Write(t.Context(), 3*k64, noise(1, 10)); err != nil {
		t.Errorf("Write of the tail: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.Write(ctx, 0, make([]byte, k64)); !errors.Is(err, context.Canceled) {
		t.Errorf("Write, cancelled: %v", err)
	}
}

func TestCommitChecksThePoint(t *testing.T) {
	for name, change := range map[string]func(*Point){
		"no consistency": func(p *Point) { p.Consistency = "" },
		"unknown disk":   func(p *Point) { p.Disks[0].Name = "other" },
		"disk missing":   func(p *Point) { p.Disks = nil },
		"disk twice":     func(p *Point) { p.Disks = append(p.Disks, p.Disks[0]) },
		"year":           func(p *Point) { p.Time = time.Date(12000, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		t.Run(name, func(t *testing.T) {
			r := testRepo(t)
			w, err := r.Begin(t.Context(), "a")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = w.Abort() }()
			if _, err := w.Disk(t.Context(), DiskOptions{Name: "d", Size: k64}); err != nil {
				t.Fatal(err)
			}
			p := testPoint("d")
			change(&p)
			if _, err := w.Commit(t.Context(), p); !errors.Is(err, ErrInvalid) {
				t.Errorf("Commit: %v", err)
			}
			if names, err := r.Points(t.Context(), "a"); err != nil || len(names) != 0 {
				t.Errorf("points %v, %v", names, err)
			}
		})
	}
}

func TestDamagedNewestPointIsPassedOver(t *testing.T) {
	r := testRepo(t)
	p1 := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	p2 := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(2, k64)})
	flip(t, filepath.Join(r.Location(), r.pointObject(p2.Name())), 1000)
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	if w.Parent() == nil || w.Parent().ID != p1.ID || len(w.Unreadable()) != 1 || !errors.Is(w.Unreadable()[0], ErrCorrupt) {
		t.Errorf("parent %+v, unreadable %v", w.Parent(), w.Unreadable())
	}
	if _, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	p := testPoint("disk0")
	p.Time = p1.Time // before the damaged one
	pub, err := w.Commit(t.Context(), p)
	if err != nil || !pub.Time.After(p2.Time) {
		t.Errorf("%v is not after the damaged %v: %v", pub.Time, p2.Time, err)
	}
}

func TestFindByEveryKindOfName(t *testing.T) {
	r := testRepo(t)
	at := time.Date(2026, 3, 4, 10, 0, 0, 500, time.UTC)
	pts := make([]*Point, 0, 3)
	for i := range 3 {
		w, err := r.Begin(t.Context(), "web-1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Disk(t.Context(), DiskOptions{Name: "d", Size: k64}); err != nil {
			t.Fatal(err)
		}
		p := testPoint("d")
		p.Time = at.Add(time.Duration(i) * time.Hour)
		pub, err := w.Commit(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		pts = append(pts, pub)
	}
	for ref, want := range map[string]int{
		"web-1":                                     2,
		"web-1@latest":                              2,
		"web-1@" + pts[1].ID:                        1,
		"web-1@" + pts[0].ID[:8]:                    0,
		"web-1@2026-03-04T10-00-00Z":                0, // the second in which it was
		"web-1@2026-03-04T10:00:00Z":                0,
		"web-1@2026-03-04T11:59:59Z":                1,
		"web-1@2026-03-04T12:30:00.000000600+00:30": 2,
		"web-1@2030-01-01T00:00:00Z":                2,
	} {
		p, err := r.Find(t.Context(), ref)
		if err != nil || p.ID != pts[want].ID {
			t.Errorf("Find(%q) = %v, want point %d", ref, err, want)
		}
	}
	for ref, want := range map[string]error{
		"nobody":                               ErrNotFound,
		"web-1@2026-03-04T09:59:59Z":           ErrNotFound,
		"web-1@2026-03-04T10:00:00.000000499Z": ErrNotFound,
		"web-1@ffffffffffffffff":               ErrNotFound,
		"web-1@yesterday":                      ErrInvalid,
		"web-1@":                               ErrInvalid,
		"../web-1":                             ErrInvalid,
		"":                                     ErrInvalid,
	} {
		if _, err := r.Find(t.Context(), ref); !errors.Is(err, want) {
			t.Errorf("Find(%q): %v, want %v", ref, err, want)
		}
	}
	names, err := r.Points(t.Context(), "web-1")
	if err != nil {
		t.Fatal(err)
	}
	names[0].ID, names[1].ID = "abcd000000000000", "abcd111111111111"
	if _, err := pick(names, "abcd"); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("ambiguous prefix: %v", err)
	}
	vms, err := r.VMs(t.Context())
	if err != nil || !slices.Equal(vms, []string{"web-1"}) {
		t.Errorf("VMs: %v, %v", vms, err)
	}
}

func TestValidVM(t *testing.T) {
	for _, n := range []string{"a", "A9", "web-1.example_x", strings.Repeat("x", 64)} {
		if err := ValidVM(n); err != nil {
			t.Errorf("%q: %v", n, err)
		}
	}
	for _, n := range []string{"", ".", "..", ".a", "-a", "_a", "a/b", "a@b", "ä", "a b", "a\n", strings.Repeat("x", 65)} {
		if err := ValidVM(n); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", n, err)
		}
	}
}
