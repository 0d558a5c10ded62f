package store

import (
	"os"
	"path/filepath"
	"testing"
)

func TestStatsSayWhoNeedsWhat(t *testing.T) {
	r := testRepo(t)
	size := int64(20 << 20) // two levels
	image := noise(1, 10*k64)
	p1 := backup(t, r, DiskOptions{Size: size}, write{0, image})
	p2 := backup(t, r, DiskOptions{Size: size}, write{0, noise(2, k64)})
	p3 := backup(t, r, DiskOptions{Size: size}, write{15 << 20, text(3, 2*k64)})
	backupVM(t, r, "b", DiskOptions{Size: size, Dedup: true}, write{8 << 20, image})

	s, err := r.Stats(t.Context(), true, nil)
	if err != nil || len(s.Damaged) > 0 {
		t.Fatal(err, s.Damaged)
	}
	if s.Points != 4 || s.Logical != 4*size || s.Data != (10+10+12+10)*k64 || s.Content != 12*k64 || s.Garbage != 0 {
		t.Errorf("all: %+v", s)
	}
	if a, b := s.VMs[0], s.VMs[1]; a.VM != "a" || a.Points != 3 || a.Data != 32*k64 || b.VM != "b" || b.Points != 1 || b.Data != 10*k64 {
		t.Errorf("VMs: %+v", s.VMs)
	}
	// What a point alone needs is what a collection frees when it is forgotten.
	for i, p := range []*Point{p1, p2, p3} {
		if s.EachPoint[i].Point != p.Name() {
			t.Fatalf("points: %+v", s.EachPoint)
		}
	}
	if one := s.EachPoint[0]; one.Unique < packEntryLen || one.Unique > 4<<10 { // its data is the other VM's too: some nodes are left
		t.Errorf("the first point alone needs %+v", one)
	}
	if _, err := r.Forget(t.Context(), []PointName{p1.Name(), p2.Name(), p3.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	after, err := r.Stats(t.Context(), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if freed := s.Stored - after.Stored; freed != s.VMs[0].Unique || after.VMs[0].Unique != after.Stored || after.EachPoint != nil {
		t.Errorf("without a: %+v; freed %d, unique was %d", after, freed, s.VMs[0].Unique)
	}
	dry := gc(t, r, GCOptions{DryRun: true})
	if after.Garbage == 0 || dry.Garbage < after.Garbage {
		t.Errorf("garbage %d, the collection says %d", after.Garbage, dry.Garbage)
	}
	gc(t, r, GCOptions{Garbage: 1e-9})
	clean, err := r.Stats(t.Context(), false, nil)
	if err != nil || clean.Garbage != 0 || clean.Stored != after.Stored {
		t.Errorf("collected: %+v, %v", clean, err)
	}
}

// Between the two acts of a compaction the newest generation is what counts, and the older one is garbage.
func TestStatsOfAPackBetweenGenerations(t *testing.T) {
	r := testRepo(t)
	r.dataPackLen = dataPackLen
	p := backup(t, r, DiskOptions{Size: 40 * 4096, Grain: 4096}, write{0, noise(1, 40*4096)})
	before, err := r.Stats(t.Context(), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := r.newMapLookup(t, p, 0)
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.Stat(filepath.Join(r.Location(), packName(ref.Pack)))
	if err != nil {
		t.Fatal(err)
	}
	compactByHand(t, r, ref.Pack, 1, 2, func(ord uint32) bool { return ord >= 20 })
	s, err := r.Stats(t.Context(), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.Garbage != old.Size() || s.Content != before.Content/2 || s.Packs != before.Packs+1 {
		t.Errorf("garbage %d, content %d of %d, %d packs of %d", s.Garbage, s.Content, before.Content, s.Packs, before.Packs)
	}
}
