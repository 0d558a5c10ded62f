package store

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

// compactByHand writes a new generation of a pack in which the records dead are
// absent, as compaction does, and leaves the old object.
func compactByHand(t testing.TB, r *Repo, id PackID, from, to uint32, dead func(ord uint32) bool) {
	t.Helper()
	old, err := os.ReadFile(r.Location() + "/" + packObject(id, from))
	if err != nil {
		t.Fatal(err)
	}
	x, err := r.loadGeneration(t.Context(), id, from)
	if err != nil {
		t.Fatal(err)
	}
	b := newPackCopy(nil, x, id, r.repo)
	for ord := range uint32(x.count()) {
		e, _ := x.entry(ord)
		if dead(ord) {
			gone := packEntry{off: uint32(len(b.buf)), raw: e.raw, codec: codecAbsent, hash: e.hash}
			b.entries = gone.append(b.entries)
			continue
		}
		b.add(old[e.off:e.off+e.stored], int(e.raw), e.codec, e.hash)
	}
	doc := b.finish()
	if err := r.blobs.Put(t.Context(), packObject(id, to), bytes.NewReader(doc), int64(len(doc))); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, r *Repo, name string) {
	t.Helper()
	if err := r.blobs.Delete(t.Context(), name); err != nil {
		t.Fatal(err)
	}
}

func TestPackObjectNames(t *testing.T) {
	id := newPackID()
	for _, g := range []uint32{1, 2, 9, 10, 1<<32 - 1} {
		if !blob.ValidName(packObject(id, g)) {
			t.Errorf("%s is no name of an object", packObject(id, g))
		}
		if have, n, ok := parsePackObject(packObject(id, g)); !ok || have != id || n != g {
			t.Errorf("%s: %s, %d, %v", packObject(id, g), have, n, ok)
		}
	}
	name := packName(id)
	for _, bad := range []string{
		name + ".1", name + ".0", name + ".", name + ".02", name + ".x", name + ".2.3", name + ".4294967296", name + "0",
		name[1:], "packs/" + id.String(), "packs/zz/" + id.String(), "points/" + name[6:], "",
	} {
		if _, _, ok := parsePackObject(bad); ok {
			t.Errorf("%q is taken for a pack", bad)
		}
	}
}

// Readers that know a pack follow it when it is compacted, and fresh ones find it; each
// record by itself and in batches.
func TestReadersFollowCompaction(t *testing.T) {
	t.Parallel()
	const grains = 40
	r := testRepo(t)
	r.dataPackLen, r.nodePackLen = dataPackLen, nodePackLen
	image := noise(3, grains*4096)
	p := backup(t, r, DiskOptions{Size: grains * 4096, Grain: 4096}, write{0, image})
	root := p.Disks[0].Root
	refs := make([]Ref, grains)
	m, err := r.Map(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Refs(t.Context(), 0, refs); err != nil {
		t.Fatal(err)
	}
	id := refs[0].Pack
	dead := func(ord uint32) bool { return ord%3 == 1 }
	check := func(r *Repo, when string) {
		t.Helper()
		dst, errs := make([][]byte, grains), make([]error, grains)
		for i := range dst {
			dst[i] = make([]byte, 4096)
		}
		r.ReadGrains(t.Context(), refs, dst, func(i int, err error) { errs[i] = err })
		for i, ref := range refs {
			one := make([]byte, 4096)
			err := r.ReadGrain(t.Context(), ref, one)
			for how, got := range map[string]error{"alone": err, "in a batch": errs[i]} {
				if want := dead(ref.Ord) && when != "before"; want != errors.Is(got, ErrCorrupt) || !want && got != nil {
					t.Errorf("%s: grain %d %s: %v", when, i, how, got)
				}
			}
			if err == nil && (!bytes.Equal(one, image[i*4096:][:4096]) || !bytes.Equal(dst[i], one)) {
				t.Errorf("%s: grain %d has other content", when, i)
			}
		}
	}
	warm, batch := reopen(t, r), reopen(t, r)
	check(warm, "before")
	check(batch, "before")

	compactByHand(t, r, id, 1, 2, dead)
	check(batch, "before") // the old object is there still
	remove(t, r, packObject(id, 1))
	check(warm, "compacted")
	check(reopen(t, r), "compacted")

	// Generations are numbers: 10 is after 9, whatever the order of names.
	compactByHand(t, r, id, 2, 9, dead)
	compactByHand(t, r, id, 9, 10, dead)
	remove(t, r, packObject(id, 2))
	remove(t, r, packObject(id, 9))
	check(warm, "compacted again")
	check(batch, "compacted while nobody looked")

	// It costs nothing once it is known.
	c := counting(warm)
	if err := warm.ReadGrain(t.Context(), refs[0], make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if n, _, ops := c.since(); n != 1 {
		t.Errorf("a read of a pack that has moved before takes %v", ops)
	}
	remove(t, r, packObject(id, 10))
	for _, r := range []*Repo{warm, reopen(t, r)} {
		if err := r.ReadGrain(t.Context(), refs[0], make([]byte, 4096)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("a lost pack gives %v", err)
		}
	}
}

// A map and a verification find nodes that moved.
func TestMapsFollowCompaction(t *testing.T) {
	t.Parallel()
	r := testRepo(t)
	image := noise(3, 200*4096)
	old := backup(t, r, DiskOptions{Size: 200 * 4096, Grain: 4096}, write{0, image})
	p := backup(t, r, DiskOptions{Size: 200 * 4096, Grain: 4096}, write{0, noise(4, 4096)})
	copy(image, noise(4, 4096))
	reader := reopen(t, r)
	if _, err := reader.Map(p.Disks[0].Root); err != nil {
		t.Fatal(err)
	}
	wantDisk(t, reader, p, image)
	var ids []PackID
	for _, name := range objects(t, r) {
		if id, _, ok := parsePackObject(name); ok {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b PackID) int { return bytes.Compare(a[:], b[:]) })
	for _, id := range ids {
		compactByHand(t, r, id, 1, 2, func(uint32) bool { return false })
		remove(t, r, packObject(id, 1))
	}
	wantDisk(t, reader, p, image)
	wantDisk(t, reopen(t, r), p, image)
	wantClean(t, reopen(t, r), old)
	wantClean(t, reader, p)
	rep, err := reopen(t, r).Verify(t.Context(), p, false, nil)
	if err != nil || !rep.OK() {
		t.Errorf("quick verify: %v, %+v", err, rep.Problems)
	}
}

// Deduplication must not refer to what compaction has dropped.
func TestDedupLeavesAbsentRecordsOut(t *testing.T) {
	t.Parallel()
	r := testRepo(t)
	r.dataPackLen = dataPackLen
	image := noise(5, 8*4096)
	p := backup(t, r, DiskOptions{Size: 8 * 4096, Grain: 4096}, write{0, image})
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := m.Lookup(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	compactByHand(t, r, ref.Pack, 1, 2, func(ord uint32) bool { return ord == ref.Ord })
	remove(t, r, packObject(ref.Pack, 1))
	r = reopen(t, r)
	if rep, err := r.Verify(t.Context(), p, false, nil); err != nil || len(rep.Problems) != 1 || rep.Problems[0].Off != 3*4096 {
		t.Errorf("a quick check of a point that needs a dropped record: %v, %+v", err, rep.Problems)
	}
	w, err := r.Begin(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 8 * 4096, Grain: 4096, Dedup: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), 0, image); err != nil {
		t.Fatal(err)
	}
	q, err := w.Commit(t.Context(), testPoint("disk0"))
	if err != nil {
		t.Fatal(err)
	}
	if q.Disks[0].Stats.New != 4096 {
		t.Errorf("%d bytes are new, want the one grain that was dropped", q.Disks[0].Stats.New)
	}
	wantDisk(t, reopen(t, r), q, image)
}
