package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

// backupOf is backup for any VM, without looking for content elsewhere.
func backupOf(t testing.TB, r *Repo, vm string, size int64, writes ...write) *Point {
	t.Helper()
	return backupVM(t, r, vm, DiskOptions{Size: size, Grain: 4096}, writes...)
}

func allNames(t testing.TB, r *Repo) []PointName {
	t.Helper()
	names, err := r.allPoints(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func repairAll(t testing.TB, r *Repo, o RepairOptions) RepairReport {
	t.Helper()
	rep, err := r.Repair(t.Context(), allNames(t, r), o)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

const sickSize = 1<<20 + 100

// sickRepo holds two points of "a". If twins, each record of them is also in another pack.
func sickRepo(t testing.TB, r *Repo, twins bool) (points []*Point, images [][]byte) {
	t.Helper()
	image := make([]byte, sickSize)
	copy(image, noise(1, 20*4096))
	copy(image[512<<10:], text(2, 20*4096))
	copy(image[1<<20:], "tail")
	points = append(points, backupOf(t, r, "a", sickSize, write{0, image}))
	images = append(images, slices.Clone(image))
	copy(image[4096:], noise(3, 2*4096))
	points = append(points, backupOf(t, r, "a", sickSize, write{4096, image[4096 : 3*4096]}))
	images = append(images, slices.Clone(image))
	if !twins {
		return points, images
	}
	backupOf(t, r, "b", sickSize, write{0, images[0]})
	backupOf(t, r, "c", sickSize, write{0, images[1]})
	twinNodes(t, r)
	return points, images
}

// twinNodes puts each map node into another pack as well.
func twinNodes(t testing.TB, r *Repo) {
	t.Helper()
	var nodes []PackID
	for info, err := range r.blobs.List(t.Context(), packPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		if id, _, ok := parsePackObject(info.Name); ok {
			nodes = append(nodes, id)
		}
	}
	for _, id := range nodes {
		x, err := r.index(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if x.kind != kindNode {
			continue
		}
		b := builder(t, r, kindNode, newPackID())
		for ord := range uint32(x.count()) {
			e, _ := x.entry(ord)
			raw := make([]byte, e.raw)
			if err := r.readEntry(t.Context(), x, Ref{Hash: e.hash, Pack: id, Ord: ord}, e, raw); err != nil {
				t.Fatal(err)
			}
			b.add(raw, len(raw), codecRaw, e.hash)
		}
		doc := b.finish()
		if err := r.blobs.Put(t.Context(), packName(b.id), bytes.NewReader(doc), int64(len(doc))); err != nil {
			t.Fatal(err)
		}
	}
}

// packsOf returns the packs that a point leads to, by kind.
func packsOf(t testing.TB, r *Repo, p *Point) map[PackID]packKind {
	t.Helper()
	m := newMarker(r.reader)
	if err := m.roots(t.Context(), rootRefs(p)); err != nil {
		t.Fatal(err)
	}
	out := map[PackID]packKind{}
	for id := range m.sets {
		x, err := r.index(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		out[id] = x.kind
	}
	return out
}

// harm damages the file of a pack in one of several ways: of records, the second.
func harm(t testing.TB, r *Repo, id PackID, how string) {
	t.Helper()
	file := filepath.Join(r.Location(), packName(id))
	x, err := r.index(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	e, _ := x.entry(uint32(min(1, x.count()-1)))
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	switch how {
	case "record":
		b[e.off+17] ^= 4
	case "header":
		b[20] ^= 1
	case "index":
		b[len(b)-packFooterLen-60] ^= 1
	case "footer":
		b[len(b)-30] ^= 1
	case "cut":
		b = b[:len(b)/2]
	case "removed":
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		return
	default:
		t.Fatal(how)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRepairHealsFromCopies(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"record", "header", "index", "footer", "cut", "removed"} {
		for _, kind := range []packKind{kindData, kindNode} {
			t.Run(fmt.Sprintf("%s %s", kind, how), func(t *testing.T) {
				t.Parallel()
				r := testRepo(t)
				points, images := sickRepo(t, r, true)
				for id, k := range packsOf(t, r, points[0]) {
					if k == kind {
						harm(t, r, id, how)
					}
				}
				r = reopen(t, r)
				before := objects(t, r)
				dry := repairAll(t, r, RepairOptions{DryRun: true})
				if !slices.Equal(before, objects(t, r)) {
					t.Error("a dry run changed something")
				}
				if !dry.Points[0].Damaged() || dry.Points[0].Damage == 0 {
					t.Fatalf("nothing was damaged: %+v", dry)
				}
				rep := repairAll(t, r, RepairOptions{})
				if testEncrypted && kind == kindNode && how != "record" {
					// Nothing says in what form the nodes were sealed.
					if !rep.Lost() || len(rep.Packs) > 0 {
						t.Errorf("report: %+v", rep)
					}
					return
				}
				if rep.Lost() || len(rep.Packs) == 0 {
					t.Fatalf("report: %+v", rep)
				}
				for i, p := range points {
					wantClean(t, reopen(t, r), p)
					wantDisk(t, reopen(t, r), p, images[i])
					wantDisk(t, r, p, images[i]) // with what it had cached
				}
				for _, q := range rep.Packs {
					if left := objectsBelow(t, r, packName(q.Pack)); !slices.Equal(left, []string{q.Object}) || q.Lost != 0 || q.Healed == 0 {
						t.Errorf("pack: %+v; there are %v", q, left)
					}
					if there, _ := r.exists(t.Context(), packName(q.Pack)); there {
						t.Errorf("%s is there still", packName(q.Pack))
					}
					if whole := how == "record" || how == "removed"; (len(q.Kept) == 0) != whole {
						t.Errorf("%s: kept %v", how, q.Kept)
					}
				}
				if again := repairAll(t, r, RepairOptions{}); len(again.Packs) > 0 || again.Lost() || again.Points[0].Damaged() {
					t.Errorf("again: %+v", again)
				}
				if left := objectsBelow(t, r, damagePrefix); len(left) > 0 {
					t.Errorf("notes: %v", left)
				}
				if _, err := r.GC(t.Context(), GCOptions{Garbage: 1e-9}); err != nil {
					t.Error(err)
				}
				wantDisk(t, reopen(t, r), points[1], images[1])
			})
		}
	}
}

// damageGrain flips a bit in the stored grain n of a point.
func damageGrain(t testing.TB, r *Repo, p *Point, n int64) Ref {
	t.Helper()
	ref, err := r.newMapLookup(t.(*testing.T), p, n)
	if err != nil {
		t.Fatal(err)
	}
	e, err := r.locate(t.Context(), ref, kindData)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(r.Location(), packObject(ref.Pack, r.moved.get(ref.Pack))), int(e.off)*8+77)
	return ref
}

func TestUnhealableIsNamedAndHealedByTheNextBackup(t *testing.T) {
	t.Parallel()
	r := testRepo(t)
	points, images := sickRepo(t, r, false)
	damageGrain(t, r, points[0], 5)
	damageGrain(t, r, points[0], 1) // which the second point has not
	damageGrain(t, r, points[0], 0)
	r = reopen(t, r)
	rep := repairAll(t, r, RepairOptions{})
	ranges := func(lost []Lost) (out []Covered) {
		for _, l := range lost {
			out = append(out, Covered{l.Off, l.Len})
		}
		return out
	}
	if want := []Covered{{0, 8192}, {5 * 4096, 4096}}; !slices.Equal(ranges(rep.Points[0].Lost), want) || rep.Points[0].Damage != 3*4096 {
		t.Errorf("first: %+v", rep.Points[0])
	}
	if want := []Covered{{0, 4096}, {5 * 4096, 4096}}; !slices.Equal(ranges(rep.Points[1].Lost), want) {
		t.Errorf("second: %+v", rep.Points[1])
	}
	if len(rep.Packs) != 0 || len(objectsBelow(t, r, salvagePrefix)) != 0 {
		t.Errorf("packs: %+v", rep.Packs)
	}
	known, err := r.Damages(t.Context(), "a")
	if err != nil || len(known) != 2 {
		t.Fatalf("notes: %+v, %v", known, err)
	}
	if d := known[points[0].Name()]; d.Bytes() != 3*4096 {
		t.Errorf("note: %+v", d)
	}
	if _, _, err := r.FindWhole(t.Context(), "a"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a damaged point is offered: %v", err)
	}
	if p, d, err := r.FindWhole(t.Context(), "a@"+points[1].ID); err != nil || d == nil || p.ID != points[1].ID {
		t.Errorf("by its ID: %v, %v, %v", p, d, err)
	}
	// A second run changes nothing, nor does a quick one, which does not see the damage.
	notes := objectsBelow(t, r, damagePrefix)
	repairAll(t, r, RepairOptions{})
	repairAll(t, r, RepairOptions{Quick: true})
	if again := objectsBelow(t, r, damagePrefix); !slices.Equal(again, notes) {
		t.Errorf("notes %v became %v", notes, again)
	}

	// A backup of another VM does not refer to what is lost, though it looks for content everywhere.
	other := backupDedup(t, r, "x", images[0], write{0, images[0]})
	wantClean(t, r, other)
	if lost := repairAll(t, r, RepairOptions{}); lost.Lost() {
		t.Errorf("content came back, and was not taken: %+v", lost)
	}
	if left := objectsBelow(t, r, damagePrefix); len(left) > 0 {
		t.Errorf("notes: %v", left)
	}
	for i, p := range points {
		wantDisk(t, reopen(t, r), p, images[i])
		wantClean(t, reopen(t, r), p)
	}
	if p, d, err := r.FindWhole(t.Context(), "a"); err != nil || d != nil || p.ID != points[1].ID {
		t.Errorf("latest: %v, %v, %v", p, d, err)
	}
}

// A copy that is damaged too is none.
func TestRepairTakesNoDamagedCopy(t *testing.T) {
	r := testRepo(t)
	sickRepo(t, r, true)
	for _, n := range allNames(t, r) {
		p, err := r.Point(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		if p.VM != "a" || p.Parent == "" { // the second of "a" shares it
			damageGrain(t, r, p, 6)
		}
	}
	r = reopen(t, r)
	before := objectsBelow(t, r, packPrefix)
	rep := repairAll(t, r, RepairOptions{})
	for _, p := range rep.Points {
		if len(p.Lost) != 1 || p.Lost[0].Off != 6*4096 || p.Lost[0].Len != 4096 {
			t.Errorf("%+v", p)
		}
	}
	if len(rep.Packs) > 0 || !slices.Equal(before, objectsBelow(t, r, packPrefix)) {
		t.Errorf("packs: %+v", rep.Packs)
	}
	d, err := r.Decide(t.Context(), "b", Policy{Last: 1}, time.UTC)
	if err != nil || len(d) != 1 || !d[0].Keep {
		t.Errorf("the only point of a VM: %+v, %v", d, err)
	}
}

// A point that is known to be damaged doesn't stand for a whole one.
func TestPolicyKeepsAWholePointBesideADamagedOne(t *testing.T) {
	r := testRepo(t)
	points, _ := sickRepo(t, r, false)
	damageGrain(t, r, points[1], 1) // the older one has other content there
	r = reopen(t, r)
	if rep := repairAll(t, r, RepairOptions{}); len(rep.Points[0].Lost) > 0 || len(rep.Points[1].Lost) == 0 {
		t.Fatalf("report: %+v", rep)
	}
	d, err := r.Decide(t.Context(), "a", Policy{Last: 1}, time.UTC)
	if err != nil || len(d) != 2 || !d[1].Keep || !d[0].Keep {
		t.Errorf("not both are kept: %+v, %v", d, err)
	}
	if p, _, err := r.FindWhole(t.Context(), "a"); err != nil || p.ID != points[0].ID {
		t.Errorf("latest: %v, %v", p, err)
	}
}

func backupDedup(t testing.TB, r *Repo, vm string, image []byte, writes ...write) *Point {
	t.Helper()
	return backupVM(t, r, vm, DiskOptions{Size: int64(len(image)), Grain: 4096, Dedup: true}, writes...)
}

// What is lost, by whatever damage, is what the next backup is told to write; then it is whole.
func TestNextBackupHealsWhatIsLost(t *testing.T) {
	t.Parallel()
	for _, kind := range []packKind{kindData, kindNode} {
		for _, how := range []string{"record", "footer", "removed"} {
			t.Run(fmt.Sprintf("%s %s", kind, how), func(t *testing.T) {
				t.Parallel()
				r := testRepo(t)
				points, images := sickRepo(t, r, false)
				for id, k := range packsOf(t, r, points[0]) {
					if k == kind {
						harm(t, r, id, how)
					}
				}
				// The repository that noticed nothing keeps maps in its cache.
				rep := repairAll(t, r, RepairOptions{})
				last := rep.Points[1]
				if len(last.Lost) == 0 {
					t.Fatalf("nothing is lost: %+v", rep)
				}
				w, err := r.Begin(t.Context(), "a")
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = w.Abort() }()
				d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: sickSize, Grain: 4096})
				if err != nil {
					t.Fatal(err)
				}
				var told int64
				for _, c := range d.Lost() {
					told += c.Len
					if err := d.Write(t.Context(), c.Off, images[1][c.Off:c.Off+c.Len]); err != nil {
						t.Fatal(err)
					}
				}
				if want := bytesLost(last.Lost); told != want {
					t.Errorf("to be written: %d bytes, lost: %d", told, want)
				}
				p, err := w.Commit(t.Context(), testPoint("disk0"))
				if err != nil {
					t.Fatal(err)
				}
				wantClean(t, reopen(t, r), p)
				wantDisk(t, reopen(t, r), p, images[1])
				if found, bad, err := r.FindWhole(t.Context(), "a@latest"); err != nil || bad != nil || found.ID != p.ID {
					t.Errorf("latest: %v, %v, %v", found, bad, err)
				}
				// And the older ones are healed from it, as far as they had the same.
				rep = repairAll(t, r, RepairOptions{})
				if kind == kindData && len(rep.Points[1].Lost) > 0 {
					t.Errorf("the point before is not healed: %+v", rep.Points[1])
				}
				for i, q := range points {
					if len(rep.Points[i].Lost) == 0 {
						wantClean(t, reopen(t, r), q)
						wantDisk(t, reopen(t, r), q, images[i])
					}
				}
			})
		}
	}
}

func bytesLost(lost []Lost) (n int64) {
	for _, l := range lost {
		n += l.Len
	}
	return n
}

func TestDamagedPointDocumentIsNoted(t *testing.T) {
	r := testRepo(t)
	points, images := sickRepo(t, r, false)
	flip(t, filepath.Join(r.Location(), r.pointObject(points[1].Name())), 900)
	rep := repairAll(t, r, RepairOptions{})
	if l := rep.Points[1].Lost; len(l) != 1 || l[0].Object != r.pointObject(points[1].Name()) || len(rep.Points[0].Lost) > 0 {
		t.Errorf("report: %+v", rep)
	}
	p, _, err := r.FindWhole(t.Context(), "a@latest")
	if err != nil || p.ID != points[0].ID {
		t.Fatalf("latest: %v, %v", p, err)
	}
	wantDisk(t, r, p, images[0])
	if _, err := r.Forget(t.Context(), []PointName{points[1].Name()}, nil); err != nil {
		t.Fatal(err)
	}
	if left := objectsBelow(t, r, damagePrefix); len(left) > 0 {
		t.Errorf("notes of a forgotten point: %v", left)
	}
}

// A pack that was rebuilt from what was left does not make a collection drop the whole one, put back.
func TestPackPutBackIsNotCollected(t *testing.T) {
	r := testRepo(t)
	points, images := sickRepo(t, r, false)
	ref, err := r.newMapLookup(t, points[0], 3)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(r.Location(), packName(ref.Pack))
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	r = reopen(t, r)
	repairAll(t, r, RepairOptions{})
	backupDedup(t, r, "x", images[0], write{3 * 4096, images[0][3*4096 : 5*4096]})
	rep := repairAll(t, r, RepairOptions{})
	if len(rep.Packs) != 1 || rep.Packs[0].Healed != 2 || rep.Packs[0].Lost == 0 {
		t.Fatalf("report: %+v", rep)
	}
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	gc, err := r.GC(t.Context(), GCOptions{})
	if err != nil || len(gc.Damaged) == 0 {
		t.Errorf("gc: %+v, %v", gc, err)
	}
	r = reopen(t, r)
	for i, p := range points {
		wantDisk(t, r, p, images[i])
	}
	// With damage in the one put back, the two are made one.
	damageGrain(t, r, points[0], 3)
	r = reopen(t, r)
	if rep := repairAll(t, r, RepairOptions{}); rep.Lost() {
		t.Errorf("report: %+v", rep)
	}
	for i, p := range points {
		wantDisk(t, reopen(t, r), p, images[i])
	}
	if left := objectsBelow(t, r, packName(ref.Pack)); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

func TestRepairNeedsTheFullKeyAndTheLock(t *testing.T) {
	r := testRepo(t)
	points, _ := sickRepo(t, r, false)
	unlock, err := r.blobs.(blob.Locker).Lock(t.Context(), "gc")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Repair(t.Context(), []PointName{points[0].Name()}, RepairOptions{}); !errors.Is(err, ErrLocked) {
		t.Errorf("beside a collection: %v", err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}

	full := encryptedRepo(t)
	points, _ = sickRepo(t, full, false)
	damageGrain(t, full, points[0], 5)
	k, _ := addFile(t, full, WriterKey)
	w := openWith(t, full, k)
	if _, err := w.Repair(t.Context(), allNames(t, w), RepairOptions{}); !errors.Is(err, ErrWriterKey) {
		t.Errorf("with a writer's key: %v", err)
	}
	repairAll(t, full, RepairOptions{})
	// It can read what is noted, and does not offer the point.
	if known, err := w.Damages(t.Context(), "a"); err != nil || len(known) != 2 {
		t.Errorf("notes: %v, %v", known, err)
	}
	p := backupDedup(t, w, "a", make([]byte, sickSize), write{5 * 4096, noise(1, 20*4096)[5*4096 : 6*4096]})
	wantClean(t, full, p)
}

// A read that fails is no damage: nothing is decided.
func TestRepairStopsWhereReadingFails(t *testing.T) {
	m := newStill(t)
	r := openMem(t, m)
	p := backup(t, r, DiskOptions{Size: 40 * 4096, Grain: 4096}, write{0, noise(1, 40*4096)})
	some := false
	for die := 1; die < 100; die++ {
		f := &failingReads{Store: m.clone()}
		f.in.Store(int64(die))
		_, err := openMem(t, f).Repair(t.Context(), []PointName{p.Name()}, RepairOptions{})
		failed := f.in.Load() <= 0
		some = some || failed
		if failed && !errors.Is(err, errKilled) {
			t.Errorf("read %d failed: %v", die, err)
		}
		for info, err := range f.List(t.Context(), damagePrefix) {
			t.Errorf("read %d failed: %s, %v", die, info.Name, err)
		}
	}
	if !some {
		t.Error("no read failed")
	}
}

type failingReads struct {
	blob.Store
	in atomic.Int64
}

func (f *failingReads) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if strings.HasPrefix(name, packPrefix) {
		if f.in.Add(-1) == 0 { // once
			return 0, errKilled
		}
	}
	return f.Store.ReadAt(ctx, name, p, off)
}
