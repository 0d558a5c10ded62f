package store

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// flip changes one bit of a file and returns what undoes it.
func flip(t testing.TB, file string, bit int) (undo func()) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b[bit/8] ^= 1 << (bit % 8)
	put := func() {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put()
	return func() {
		b[bit/8] ^= 1 << (bit % 8)
		put()
	}
}

// objects lists a repository's files by name, without locks and what says all by being there.
func objects(t testing.TB, r *Repo) (names []string) {
	t.Helper()
	err := filepath.WalkDir(r.Location(), func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && !strings.Contains(p, "/.locks/") && !strings.HasSuffix(p, doneSuffix) {
			names = append(names, strings.TrimPrefix(p, r.Location()+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// readAll opens the repository anew and reads everything of the point, and all sessions.
func readAll(t testing.TB, location string, n PointName) error {
	t.Helper()
	r, err := testOpen(t.Context(), location)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	p, err := r.Point(t.Context(), n)
	if err != nil {
		return err
	}
	for _, d := range p.Disks {
		if _, err := readDisk(t.Context(), r, d.Root); err != nil {
			return err
		}
	}
	_, err = r.sessions(t.Context())
	return err
}

func TestEveryBitFlipIsSeen(t *testing.T) {
	t.Parallel()
	r := testRepo(t)
	// Raw and compressed records, and more than one node.
	p := backup(t, r, DiskOptions{Size: 3 << 20, Grain: 4096},
		write{0, noise(1, 3*4096)}, write{1 << 20, text(2, 5*4096)}, write{2 << 20, text(3, 4096)})
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, name := range objects(t, r) {
		file := filepath.Join(r.Location(), name)
		st, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		bits := int(st.Size()) * 8
		// Every byte of header and footer, each in one bit, and a sample of the rest.
		var at []int
		for b := 0; b < min(bits, 8*packHeaderLen); b += 8 {
			at = append(at, b+rnd.IntN(8))
		}
		for b := max(0, bits-8*(packFooterLen+packEntryLen)); b < bits; b += 8 {
			at = append(at, b+rnd.IntN(8))
		}
		for range 200 {
			at = append(at, rnd.IntN(bits))
		}
		for _, b := range at {
			undo := flip(t, file, b)
			err := readAll(t, r.Location(), p.Name())
			switch {
			case err == nil:
				t.Errorf("%s: flip of bit %d (byte %d of %d) was not seen", name, b, b/8, bits/8)
			case !errors.Is(err, ErrCorrupt) && (name != "config" || !errors.Is(err, ErrNotRepository)):
				t.Errorf("%s: flip of bit %d: %v", name, b, err)
			case !strings.Contains(err.Error(), name):
				t.Errorf("%s: flip of bit %d: the error does not name the object: %v", name, b, err)
			}
			undo()
		}
	}
	if err := readAll(t, r.Location(), p.Name()); err != nil {
		t.Errorf("after all was undone: %v", err)
	}
}

func TestTruncationIsSeen(t *testing.T) {
	r := testRepo(t)
	p := backup(t, r, DiskOptions{Size: 1 << 20, Grain: 4096}, write{0, noise(1, 3*4096)}, write{64 << 10, text(2, 4096)})
	for _, name := range objects(t, r) {
		file := filepath.Join(r.Location(), name)
		whole, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{0, 1, 40, len(whole) / 2, len(whole) - 100, len(whole) - 1, len(whole) + 1} {
			b := append(append([]byte(nil), whole...), 'x')[:max(0, n)]
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
			err := readAll(t, r.Location(), p.Name())
			if !errors.Is(err, ErrCorrupt) && (name != "config" || !errors.Is(err, ErrNotRepository)) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s of %d bytes cut to %d: %v", name, len(whole), n, err)
			}
		}
		if err := os.WriteFile(file, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func packFiles(t testing.TB, r *Repo) (names []string) {
	for _, n := range objects(t, r) {
		if strings.HasPrefix(n, "packs/") {
			names = append(names, n)
		}
	}
	return names
}

func TestSwappedPacksAreSeen(t *testing.T) {
	r := testRepo(t)
	p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, 4*k64)})
	packs := packFiles(t, r)
	if len(packs) < 3 {
		t.Fatalf("only %d packs", len(packs))
	}
	a, b := filepath.Join(r.Location(), packs[0]), filepath.Join(r.Location(), packs[1])
	for _, mv := range [][2]string{{a, a + "x"}, {b, a}, {a + "x", b}} {
		if err := os.Rename(mv[0], mv[1]); err != nil {
			t.Fatal(err)
		}
	}
	err := readAll(t, r.Location(), p.Name())
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "another pack") {
		t.Errorf("read: %v", err)
	}
}

func TestPackOfAnotherRepositoryIsSeen(t *testing.T) {
	r, other := testRepo(t), testRepo(t)
	p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	other.repo = r.repo // so that its packs claim to be ours
	id := packFiles(t, r)[0]
	var pid PackID
	if err := pid.UnmarshalText([]byte(filepath.Base(id))); err != nil {
		t.Fatal(err)
	}
	b, err := newPackBuilder(nil, kindData, pid, [16]byte{9}, r.keys)
	if err != nil {
		t.Fatal(err)
	}
	b.add(noise(1, k64), k64, codecRaw, r.ids.sum(noise(1, k64)))
	if err := os.WriteFile(filepath.Join(r.Location(), id), b.finish(), 0o600); err != nil {
		t.Fatal(err)
	}
	err = readAll(t, r.Location(), p.Name())
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "another repository") {
		t.Errorf("read: %v", err)
	}
}

func TestLostPackHurtsOnlyItsPoints(t *testing.T) {
	r := testRepo(t)
	p1 := backup(t, r, DiskOptions{Size: 4 << 20}, write{0, noise(1, k64)})
	before := packFiles(t, r)
	p2 := backup(t, r, DiskOptions{Size: 4 << 20}, write{1 << 20, noise(2, 2*k64)})
	p3 := backup(t, r, DiskOptions{Size: 4 << 20}, write{1 << 20, make([]byte, 2*k64)})
	var lost string
	for _, n := range packFiles(t, r) {
		if !strings.Contains(strings.Join(before, " "), n) {
			if x, err := os.Stat(filepath.Join(r.Location(), n)); err == nil && x.Size() > k64 {
				lost = n
				break
			}
		}
	}
	if err := os.Remove(filepath.Join(r.Location(), lost)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*Point{p1, p3} {
		if err := readAll(t, r.Location(), p.Name()); err != nil {
			t.Errorf("%s: %v", p.Name(), err)
		}
		wantClean(t, r, p)
	}
	err := readAll(t, r.Location(), p2.Name())
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), lost) || !strings.Contains(err.Error(), "missing") {
		t.Errorf("%s: %v", p2.Name(), err)
	}
	for _, full := range []bool{false, true} {
		rep, err := r.Verify(t.Context(), p2, full, nil)
		if err != nil || len(rep.Problems) == 0 {
			t.Fatalf("verify: %v, %+v", err, rep)
		}
		var bytes int64
		for _, q := range rep.Problems {
			if q.Object != lost || q.Disk != "disk0" || q.Off < 1<<20 || q.Off+q.Len > 1<<20+2*k64 {
				t.Errorf("problem %+v", q)
			}
			bytes += q.Len
		}
		if bytes == 0 {
			t.Error("no extent was named")
		}
	}
}

func TestVerifyFullSeesWhatQuickDoesNot(t *testing.T) {
	r := testRepo(t)
	p := backup(t, r, DiskOptions{Size: 4<<20 + 5, Grain: 4096}, write{0, noise(1, 8*4096)}, write{4 << 20, []byte("tail!")})
	var done int64
	progress := func(d, total int64) {
		if d < done || total != 4<<20+5 {
			t.Errorf("progress %d of %d after %d", d, total, done)
		}
		done = d
	}
	if rep, err := r.Verify(t.Context(), p, true, progress); err != nil || !rep.OK() || rep.Grains != 9 || done != 4<<20+5 || rep.Bytes != 9*4096 {
		t.Fatalf("verify: %+v, %v, done %d", rep, err, done)
	}
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := m.Lookup(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	e, err := r.locate(t.Context(), ref, kindData)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(r.Location(), packName(ref.Pack)), int(e.off)*8+77)
	if rep, err := r.Verify(t.Context(), p, false, nil); err != nil || !rep.OK() {
		t.Errorf("quick: %+v, %v", rep, err)
	}
	rep, err := r.Verify(t.Context(), p, true, nil)
	if err != nil || len(rep.Problems) != 1 || rep.Problems[0].Off != 3*4096 || rep.Problems[0].Len != 4096 || rep.Problems[0].Object != packName(ref.Pack) {
		t.Errorf("full: %+v, %v", rep, err)
	}
	dst := []byte(strings.Repeat("x", 4096))
	if err := r.ReadGrain(t.Context(), ref, dst); !errors.Is(err, ErrCorrupt) || !allZero(dst) {
		t.Errorf("ReadGrain: %v, dst zero: %v", err, allZero(dst))
	}
}

func TestVerifyFindsDamagedNode(t *testing.T) {
	r := testRepo(t)
	p := backup(t, r, DiskOptions{Size: 64 << 20}, write{0, noise(1, k64)}, write{20 << 20, noise(2, k64)})
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	root, err := r.node(t.Context(), m.root.Ref, 1)
	if err != nil {
		t.Fatal(err)
	}
	leaf := root.child(5)
	e, err := r.locate(t.Context(), leaf, kindNode)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(r.Location(), packName(leaf.Pack)), int(e.off)*8+9)
	rep, err := r.Verify(t.Context(), p, false, nil)
	if err != nil || len(rep.Problems) != 1 || rep.Problems[0].Off != 20<<20 || rep.Problems[0].Len != 4<<20 {
		t.Fatalf("verify: %+v, %v", rep, err)
	}
	// The other subtree still reads.
	if _, err := reopen(t, r).newMapLookup(t, p, 0); err != nil {
		t.Error(err)
	}
	if _, err := reopen(t, r).newMapLookup(t, p, 320); !errors.Is(err, ErrCorrupt) {
		t.Errorf("look-up below the damage: %v", err)
	}

	// Writing the whole disk again heals; the point then needs nothing damaged.
	image := make([]byte, 64<<20)
	copy(image[20<<20:], noise(2, k64))
	healed := backup(t, reopen(t, r), DiskOptions{Size: 64 << 20}, write{0, image})
	wantDisk(t, reopen(t, r), healed, image)
	// Writing a part of the damaged subtree cannot, and says so.
	r = reopen(t, r)
	if err := r.blobs.Delete(t.Context(), r.pointObject(healed.Name())); err != nil {
		t.Fatal(err)
	}
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), 20<<20, noise(5, k64)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), testPoint("disk0")); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Commit over a damaged node: %v", err)
	}
}

func (r *Repo) newMapLookup(t *testing.T, p *Point, g int64) (Ref, error) {
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	return m.Lookup(t.Context(), g)
}

func TestRenamedPointIsSeen(t *testing.T) {
	r := testRepo(t)
	p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	old := filepath.Join(r.Location(), r.pointObject(p.Name()))
	for _, n := range []PointName{
		{VM: "a", ID: p.ID, Time: p.Time.Add(1)},
		{VM: "a", ID: "0123456789abcdef", Time: p.Time},
		{VM: "b", ID: p.ID, Time: p.Time},
	} {
		to := filepath.Join(r.Location(), r.pointObject(n))
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(old, to); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Find(t.Context(), n.VM); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), r.pointObject(n)) {
			t.Errorf("%s: %v", r.pointObject(n), err)
		}
		if err := os.Rename(to, old); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNoGrainPassesAsNode(t *testing.T) {
	r := testRepo(t)
	var c [fanOut]Ref
	c[0] = Ref{Hash: Hash{1}, Pack: PackID{2}, Ord: 3}
	evil := encodeNode(0, &c) // in a pack whose content a guest chooses
	b := builder(t, r, kindData, newPackID())
	ref := Ref{Hash: r.ids.sum(evil), Pack: b.id}
	b.add(evil, len(evil), codecRaw, ref.Hash)
	doc := b.finish()
	if err := r.blobs.Put(t.Context(), packName(b.id), bytes.NewReader(doc), int64(len(doc))); err != nil {
		t.Fatal(err)
	}
	if _, err := r.node(t.Context(), ref, 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a grain was read as a node: %v", err)
	}
}

func TestDamageThatDecompressionForgivesIsSeen(t *testing.T) {
	r := testRepo(t)
	p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, text(1, k64)})
	ref, err := r.newMapLookup(t, p, 0)
	if err != nil {
		t.Fatal(err)
	}
	e, err := r.locate(t.Context(), ref, kindData)
	if err != nil || e.codec&codecCompression != codecZstd {
		t.Fatal(e.codec, err)
	}
	// The unused bit of the frame header descriptor (RFC 8878, 3.1.1.1.1.3).
	flip(t, filepath.Join(r.Location(), packName(ref.Pack)), int(e.off+4)*8+4)
	if err := r.ReadGrain(t.Context(), ref, make([]byte, k64)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("ReadGrain: %v", err)
	}
}

func TestFullWriteHealsDamagedRoot(t *testing.T) {
	r := testRepo(t)
	image := noise(1, 20<<20)
	p := backup(t, r, DiskOptions{Size: 20 << 20}, write{0, image})
	e, err := r.locate(t.Context(), p.Disks[0].Root.Ref, kindNode)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(r.Location(), packName(p.Disks[0].Root.Ref.Pack)), int(e.off)*8)
	r = reopen(t, r)
	healed := backup(t, r, DiskOptions{Size: 20 << 20, Dedup: true}, write{0, image})
	if s := healed.Disks[0].Stats; s.New != 0 || s.Changed != 20<<20 {
		t.Errorf("stats %+v", s)
	}
	wantDisk(t, reopen(t, r), healed, image)
	wantClean(t, r, healed)
}

func TestContentThatBeliesItsHashIsSeen(t *testing.T) {
	r := testRepo(t)
	// A pack whose index, checksums and CRC are right, but whose record is
	// another content than its hash says: what a broken writer would leave.
	for _, compressed := range []bool{false, true} {
		content := text(1, 4096)
		b := builder(t, r, kindData, newPackID())
		stored, how := content, byte(codecRaw)
		if compressed {
			var err error
			if stored, how, err = r.codec.compress(new([]byte), content); err != nil || how != codecZstd {
				t.Fatal(how, err)
			}
		}
		ref := Ref{Hash: r.ids.sum(text(2, 4096)), Pack: b.id}
		b.add(stored, 4096, how, ref.Hash)
		doc := b.finish()
		if err := r.blobs.Put(t.Context(), packName(b.id), bytes.NewReader(doc), int64(len(doc))); err != nil {
			t.Fatal(err)
		}
		dst := make([]byte, 4096)
		if err := r.ReadGrain(t.Context(), ref, dst); !errors.Is(err, ErrCorrupt) || !allZero(dst) {
			t.Errorf("compressed %v: %v, dst zero: %v", compressed, err, allZero(dst))
		}
	}
}
