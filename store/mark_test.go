package store

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// forgedPoint publishes a point of another VM whose one map node is the leaf of these grains, as somebody who may
// create objects and holds a writer's key can.
func forgedPoint(t *testing.T, r *Repo, refs ...Ref) *Point {
	t.Helper()
	var children [fanOut]Ref
	copy(children[:], refs)
	raw := encodeNode(0, &children)
	b := builder(t, r, kindNode, newPackID())
	leaf := Ref{Hash: r.ids.sum(raw), Pack: b.id}
	leaf.Ord = b.add(raw, len(raw), codecRaw, leaf.Hash)
	doc := b.finish()
	if err := r.blobs.Put(t.Context(), packName(b.id), bytes.NewReader(doc), int64(len(doc))); err != nil {
		t.Fatal(err)
	}
	p := &Point{VM: "forged", Time: time.Now().UTC().Round(0), Consistency: Crash,
		Disks: []Disk{{Name: "disk0", Root: Root{Ref: leaf, Size: fanOut * k64, Grain: k64}}}}
	if err := p.validate(); err != nil {
		t.Fatal(err)
	}
	text, id, err := encodePoint(p, r.ids)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = id
	if err := r.putDoc(t.Context(), r.pointObject(p.Name()), text); err != nil {
		t.Fatal(err)
	}
	return p
}

// A leaf may call a map node of somebody else a grain. What is below it must be marked all the same.
func TestForgedLeafDoesNotHideAMap(t *testing.T) {
	r := testRepo(t)
	image := make([]byte, 40<<20)
	copy(image, noise(1, 20*k64))
	copy(image[30<<20:], noise(2, 20*k64))
	p := backup(t, r, DiskOptions{Size: int64(len(image))}, write{0, image[:20*k64]}, write{30 << 20, image[30<<20:][:20*k64]})
	if p.Disks[0].Root.Level == 0 {
		t.Fatal("the map is one leaf")
	}
	forgedPoint(t, r, p.Disks[0].Root.Ref)
	if rep := gc(t, r, GCOptions{}); rep.Freed != 0 || rep.Deleted != 0 || rep.Compacted != 0 {
		t.Errorf("deleted what a point needs: %+v", rep)
	}
	r = reopen(t, r)
	wantClean(t, r, p)
	wantDisk(t, r, p, image)
}

// Ordinals are numbers that a writer writes: what is kept of them must not be as large as they are.
func TestForgedOrdinalsCostNoMemory(t *testing.T) {
	r := testRepo(t)
	p := forgedPoint(t, r, Ref{Hash: Hash{1}, Pack: newPackID(), Ord: 1<<32 - 1})
	m := newMarker(r.reader)
	err := m.roots(t.Context(), rootRefs(p))
	words := 0
	for _, s := range m.sets {
		words += len(*s)
	}
	if most := maxPackEntries / 64 * len(m.sets); words > most {
		t.Errorf("one grain is marked in %d words", words)
	}
	if err == nil {
		t.Error("a record that no pack can have was taken")
	}
}

// Points are walked together: what can't be followed is said of the point that it belongs to.
func TestCollectionNamesThePointThatItCannotFollow(t *testing.T) {
	r := testRepo(t)
	high := backupOf(t, r, "a", 40<<20, write{0, noise(1, k64)})
	low := backupOf(t, r, "b", k64, write{0, noise(2, k64)})
	for _, p := range []*Point{high, low} { // of the lower map is heard first
		harm(t, r, p.Disks[0].Root.Ref.Pack, "footer")
	}
	_, err := reopen(t, r).GC(t.Context(), GCOptions{})
	if err == nil || !strings.Contains(err.Error(), high.Name().String()) ||
		!strings.Contains(err.Error(), packName(high.Disks[0].Root.Ref.Pack)) || strings.Contains(err.Error(), packName(low.Disks[0].Root.Ref.Pack)) {
		t.Errorf("the point and what is wrong with it: %v", err)
	}
}

// A point whose disks hold zeroes alone has no map, and is one all the same.
func TestCollectionCountsEmptyPoints(t *testing.T) {
	r := testRepo(t)
	backupOf(t, r, "a", k64)
	backupOf(t, r, "b", k64, write{0, noise(1, k64)})
	if rep := gc(t, r, GCOptions{}); rep.Points != 2 {
		t.Errorf("%d points were followed", rep.Points)
	}
}
