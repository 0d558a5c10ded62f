package agent

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

const fakeGranule = 4 << 10

// fakeTracker is an Auditor of a file.
type fakeTracker struct {
	size   int64
	marks  []uint64 // nil: nothing changed
	marked func(off int64) bool
	lost   error    // of all Marks but the first
	later  []uint64 // more marks, of all Marks but the first
	asked  int
	doubts int
}

func (f *fakeTracker) Marks(cbt.ChangeID) (cbt.Bitmap, cbt.Evidence, error) {
	f.asked++
	bm := cbt.Bitmap{Words: make([]uint64, (f.size/fakeGranule+63)/64), Shift: 12, Size: f.size}
	bm.Or(f.marks)
	var err error
	if f.asked > 1 {
		bm.Or(f.later)
		err = f.lost
	}
	return bm, cbt.Evidence{Method: "none", Size: f.size}, err
}
func (f *fakeTracker) Marked(off, _ int64) bool { return f.marked != nil && f.marked(off) }
func (f *fakeTracker) Distrust()                { f.doubts++ }
func (f *fakeTracker) Close() error             { return nil }

// fakeDisk is a file of granules of zeroes, and a point that says so.
func fakeDisk(t *testing.T, granules int64) (a Audit, file *os.File, tracker *fakeTracker) {
	t.Helper()
	ctx, dir := t.Context(), t.TempDir()
	repo, err := store.Init(ctx, filepath.Join(dir, "repo"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = repo.Close() })
	if file, err = os.Create(filepath.Join(dir, "disk")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	size := granules * fakeGranule
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	w, err := repo.Begin(ctx, "vm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Disk(ctx, store.DiskOptions{Name: "disk0", Source: file.Name(), Size: size, Grain: fakeGranule}); err != nil {
		t.Fatal(err)
	}
	_, err = w.Commit(ctx, store.Point{VM: "vm", Time: time.Now(), Consistency: store.Crash, Disks: []store.Disk{
		{Name: "disk0", Source: file.Name(), ChangeID: "0123456789abcdef0123456789abcdef.1", Tracking: store.Tracking{Mode: "full"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	tracker = &fakeTracker{size: size}
	return Audit{
		VM: "vm", Repo: repo, Evidence: filepath.Join(dir, "evidence"), settle: time.Millisecond,
		Source: func(context.Context, string) (cbt.Auditor, error) { tracker.asked = 0; return tracker, nil },
	}, file, tracker
}

func forge(t *testing.T, f *os.File, granule int64) {
	t.Helper()
	if _, err := f.WriteAt([]byte{1}, granule*fakeGranule+17); err != nil {
		t.Fatal(err)
	}
}

// A sample of n of N granules finds k bad ones as often as it should.
func TestSampleFindsAsOftenAsItShould(t *testing.T) {
	const total, bad, samples, runs = 1000, 10, 100, 200
	a, f, _ := fakeDisk(t, total)
	for i := range int64(bad) {
		forge(t, f, 3+i*97)
	}
	a.Samples = samples
	found := 0
	for seed := range uint64(runs) {
		a.Seed = 1000 + seed
		r, err := a.Run(t.Context())
		if d := r.Disks[0]; (d.Mismatched > 0) != errors.Is(err, ErrUnrecorded) || d.Sampled != samples || d.Good+d.Mismatched != samples {
			t.Fatalf("%v: %+v", err, d)
		}
		if err != nil {
			found++
		}
	}
	p := 1 - chance(total, samples, bad)
	want, sigma := runs*p, math.Sqrt(runs*p*(1-p))
	t.Logf("found in %d of %d runs, expected %.0f ± %.0f", found, runs, want, sigma)
	if math.Abs(float64(found)-want) > 3*sigma {
		t.Errorf("found in %d of %d runs, want %.0f ± %.0f", found, runs, want, sigma)
	}
	a.Seed = 1000
	r1, _ := a.Run(t.Context())
	r2, _ := a.Run(t.Context())
	if r1.Disks[0].Mismatched != r2.Disks[0].Mismatched || r1.Seed != 1000 {
		t.Error("the same seed chose otherwise")
	}
}

// A granule that is marked by the time it has been read proves nothing.
func TestMarkedMeanwhileIsVoid(t *testing.T) {
	for name, c := range map[string]struct {
		marked                   func(off int64, nth int) bool
		void, mismatched, doubts int64
	}{
		"after the first reading":  {func(off int64, _ int) bool { return off == 5*fakeGranule }, 1, 0, 0},
		"after the second reading": {func(off int64, nth int) bool { return off == 5*fakeGranule && nth == 2 }, 1, 0, 0},
		"never":                    {func(int64, int) bool { return false }, 0, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			a, f, tr := fakeDisk(t, 64)
			forge(t, f, 5)
			nth := 0
			tr.marked = func(off int64) bool {
				if off == 5*fakeGranule { // one goroutine at a time reads it
					nth++
				}
				return c.marked(off, nth)
			}
			a.All = true
			r, err := a.Run(t.Context())
			if d := r.Disks[0]; d.Void != c.void || d.Mismatched != c.mismatched || int64(tr.doubts) != c.doubts || errors.Is(err, ErrUnrecorded) != (c.mismatched > 0) {
				t.Errorf("%v: %+v, distrusted %d times", err, d, tr.doubts)
			}
		})
	}
}

// A granule that is written after it was read is none of those that stayed unchanged.
func TestMarkedLaterIsNoSample(t *testing.T) {
	a, _, tr := fakeDisk(t, 640)
	tr.marks, tr.later = []uint64{1}, []uint64{0, 7 << 20}
	a.All = true
	r, err := a.Run(t.Context())
	if d := r.Disks[0]; err != nil || d.Unchanged != 636 || d.Good != 636 || d.Sampled != 639 || d.Void != 3 || !d.Exact {
		t.Errorf("%v: %+v", err, d)
	}
}

// If the tracker itself says by then that it may have missed something, nothing was
// missed silently.
func TestLostProofIsNoAlarm(t *testing.T) {
	a, f, tr := fakeDisk(t, 64)
	forge(t, f, 5)
	tr.lost = cbt.ErrUnproven
	a.All = true
	r, err := a.Run(t.Context())
	if !errors.Is(err, cbt.ErrUnproven) || errors.Is(err, ErrUnrecorded) || tr.doubts != 0 || r.Disks[0].Bound != 0 || r.Disks[0].Problem == "" {
		t.Errorf("%v: %+v", err, r)
	}
}

// A disk that shows a granule in two ways without a write is no miss, but no proof either.
func TestUnsteadyDisk(t *testing.T) {
	a, f, tr := fakeDisk(t, 64)
	forge(t, f, 5)
	tr.marked = func(off int64) bool {
		if off == 5*fakeGranule {
			if _, err := f.WriteAt([]byte{0}, off+17); err != nil {
				t.Error(err)
			}
		}
		return false
	}
	a.All = true
	r, err := a.Run(t.Context())
	if d := r.Disks[0]; err != nil || d.Unsteady != 1 || d.Mismatched != 0 || d.Bound != 0 || tr.doubts != 0 {
		t.Errorf("%v: %+v", err, d)
	}
}

// A disk that is another one altogether ends the audit before all of it was read twice.
func TestManyMismatchesEndTheAudit(t *testing.T) {
	a, f, tr := fakeDisk(t, 8192)
	for g := range int64(8192) {
		forge(t, f, g)
	}
	a.All = true
	r, err := a.Run(t.Context())
	d := r.Disks[0]
	bins, _ := filepath.Glob(filepath.Join(d.Evidence, "*.bin"))
	if !errors.Is(err, ErrUnrecorded) || d.Mismatched < maxMismatches || d.Mismatched > maxMismatches+readChunk/fakeGranule*auditReaders ||
		d.Early == "" || len(bins) != maxKept || tr.doubts != 1 {
		t.Errorf("%v: %d mismatches, %d files, %q, distrusted %d times", err, d.Mismatched, len(bins), d.Early, tr.doubts)
	}
}

// What can't be kept is said, and takes nothing from the alarm.
func TestEvidenceThatCannotBeKept(t *testing.T) {
	a, f, tr := fakeDisk(t, 64)
	forge(t, f, 5)
	a.All, a.Evidence = true, filepath.Join(f.Name(), "below a file")
	_, err := a.Run(t.Context())
	if !errors.Is(err, ErrUnrecorded) || !strings.Contains(err.Error(), "evidence could not be kept") || tr.doubts != 1 {
		t.Errorf("%v, distrusted %d times", err, tr.doubts)
	}
}

func TestRateIsKept(t *testing.T) {
	a, _, _ := fakeDisk(t, 512)
	a.All, a.Rate = true, 4<<20
	r, err := a.Run(t.Context())
	// The first read of a chunk waits for nobody.
	if want := 250 * time.Millisecond; err != nil || r.Took < want || r.Took > 4*want {
		t.Errorf("%v: 2 MiB at 4 MiB/s took %v", err, r.Took)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	a.Rate = 4096
	begin := time.Now()
	if _, err := a.Run(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > time.Second {
		t.Errorf("cancelled: %v after %v", err, time.Since(begin))
	}
}

// Each disk of a VM gets its part of the time, and an audit that left one out is not done.
func TestAuditTimeIsShared(t *testing.T) {
	a, _, _ := fakeDisk(t, 4096)
	w, err := a.Repo.Begin(t.Context(), "two")
	if err != nil {
		t.Fatal(err)
	}
	p := store.Point{VM: "two", Time: time.Now(), Consistency: store.Crash}
	for _, name := range []string{"disk0", "disk1"} {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, make([]byte, 4096*fakeGranule), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Disk(t.Context(), store.DiskOptions{Name: name, Source: file, Size: 4096 * fakeGranule, Grain: fakeGranule}); err != nil {
			t.Fatal(err)
		}
		p.Disks = append(p.Disks, store.Disk{Name: name, Source: file, ChangeID: "0123456789abcdef0123456789abcdef.1", Tracking: store.Tracking{Mode: "full"}})
	}
	if _, err := w.Commit(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	a.VM, a.All, a.Rate, a.Until = "two", true, 4<<20, time.Now().Add(2*time.Second)
	a.Source = func(context.Context, string) (cbt.Auditor, error) { return &fakeTracker{size: 4096 * fakeGranule}, nil }
	r, err := a.Run(t.Context())
	if err != nil || len(r.Disks) != 2 || r.Disks[0].Good == 0 || r.Disks[1].Good == 0 || !r.compared() {
		t.Errorf("%v: %+v", err, r.Disks)
	}
	a.Until = time.Now().Add(-time.Second)
	if r, err = a.Run(t.Context()); err != nil || r.compared() {
		t.Errorf("no time was left, and yet: %v, %+v", err, r.Disks)
	}
}
