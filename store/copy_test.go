package store

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
)

// history makes points of one VM whose disk changes, grows and shrinks.
func history(t *testing.T, r *Repo) (points []*Point, images [][]byte) {
	t.Helper()
	image := make([]byte, 0, 3<<20)
	for i, size := range []int{2 << 20, 2 << 20, 3<<20 - 1000, 1<<20 + 4096, 1<<20 + 4096} {
		image = slices.Clone(image[:min(size, len(image))])
		image = append(image, make([]byte, size-len(image))...)
		var writes []write
		for k := range 6 {
			off := (i*37 + k*41) % (size / 4096) * 4096
			p := text(uint64(i*10+k), 4096)
			if k == 0 {
				p = noise(uint64(k), 4096) // the same each time
			}
			if k == 1 {
				clear(p)
			}
			copy(image[off:], p)
			writes = append(writes, write{int64(off), p})
		}
		points = append(points, backup(t, r, DiskOptions{Size: int64(size), Grain: 4096, Source: "/dev/x"}, writes...))
		images = append(images, image)
	}
	return points, images
}

func copied(t *testing.T, from, to *Repo, names ...PointName) CopyReport {
	t.Helper()
	rep, err := from.Copy(t.Context(), to, names, nil)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func names(points []*Point) (out []PointName) {
	for _, p := range points {
		out = append(out, p.Name())
	}
	return out
}

// wantCopies looks that the destination has just these points.
func wantCopies(t *testing.T, from, to *Repo, points []*Point, images [][]byte) {
	t.Helper()
	there, err := to.Points(t.Context(), "a")
	if err != nil || len(there) != len(points) {
		t.Fatalf("points %v, %v, want %d", there, err, len(points))
	}
	for i, n := range there {
		p, err := to.Point(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		wantClean(t, to, p)
		wantDisk(t, to, p, images[i])
		was := points[i]
		parent := ""
		if i > 0 && points[i-1].ID == was.Parent {
			parent = there[i-1].ID
		}
		if !p.Time.Equal(was.Time) || p.Consistency != was.Consistency || p.Parent != parent || *p.Origin != (Origin{from.ID(), was.ID}) ||
			p.Disks[0].ChangeID != was.Disks[0].ChangeID || p.Disks[0].Stats != was.Disks[0].Stats || p.Disks[0].Source != "/dev/x" {
			t.Errorf("the copy of %+v is %+v", was, p)
		}
	}
}

func TestCopySendsWhatIsMissing(t *testing.T) {
	from, to := testRepo(t), testRepo(t)
	points, images := history(t, from)
	all := copied(t, from, to, names(points)...)
	wantCopies(t, from, to, points, images)
	if all.Present != 0 || len(all.Points) != 5 || all.Sent >= all.Grains || all.Sent == 0 {
		t.Errorf("copy: %+v", all)
	}
	if again := copied(t, from, to, names(points)...); again.Present != 5 || again.Grains != 0 || again.Stored != 0 {
		t.Errorf("copied again: %+v", again)
	}
	// Back: they are there already.
	there, err := to.Points(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if back := copied(t, to, from, there...); back.Present != 5 {
		t.Errorf("copied back: %+v", back)
	}
	// A backup goes on from a copy as from any point.
	next := backup(t, to, DiskOptions{Size: int64(len(images[4])), Grain: 4096}, write{0, noise(99, 4096)})
	copy(images[4], noise(99, 4096))
	wantDisk(t, to, next, images[4])
	wantClean(t, to, next)
}

func TestCopyOfSomePoints(t *testing.T) {
	from, to := testRepo(t), testRepo(t)
	points, images := history(t, from)
	// The newest first; then older ones take their place before it.
	copied(t, from, to, points[4].Name())
	copied(t, from, to, points[0].Name(), points[1].Name())
	wantCopies(t, from, to, []*Point{points[0], points[1], points[4]}, [][]byte{images[0], images[1], images[4]})
	if rep := copied(t, from, to, points[2].Name(), points[3].Name()); rep.Grains > 12 {
		t.Errorf("only what differs from the point before should be looked at: %+v", rep)
	}
	there, err := to.Points(t.Context(), "a")
	if err != nil || len(there) != 5 {
		t.Fatalf("%v, %v", there, err)
	}
}

func TestCopyRefusesAnotherPointOfThatTime(t *testing.T) {
	from, to := testRepo(t), testRepo(t)
	p := backup(t, from, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	w, err := to.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	other := testPoint("disk0")
	other.Time = p.Time
	if _, err := w.Commit(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if _, err := from.Copy(t.Context(), to, []PointName{p.Name()}, nil); !errors.Is(err, ErrExists) {
		t.Errorf("Copy: %v", err)
	}
	if _, err := from.Copy(t.Context(), from, []PointName{p.Name()}, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("Copy onto itself: %v", err)
	}
}

func TestDamageIsNotCopied(t *testing.T) {
	from, to := testRepo(t), testRepo(t)
	points, _ := history(t, from)
	m, err := from.Map(points[1].Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	for g := range m.Grains() {
		ref, err := m.Lookup(t.Context(), g)
		if err != nil {
			t.Fatal(err)
		}
		if ref.IsZero() || ref.Pack == points[0].Disks[0].Root.Ref.Pack {
			continue
		}
		e, err := from.locate(t.Context(), ref, kindData)
		if err != nil {
			t.Fatal(err)
		}
		flip(t, filepath.Join(from.Location(), packName(ref.Pack)), int(e.off)*8+3)
		break
	}
	_, err = from.Copy(t.Context(), to, names(points), nil)
	if !errors.Is(err, ErrCorrupt) {
		t.Errorf("Copy: %v", err)
	}
	there, err := to.Points(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range there {
		p, err := to.Point(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		wantClean(t, to, p)
	}
}

func TestCopyKilledInEveryChange(t *testing.T) {
	t.Parallel()
	from := testRepo(t)
	points, images := history(t, from)
	base := newStill(t)
	// What it builds on besides: another VM's points, some of which is garbage.
	if _, err := from.Copy(t.Context(), openMem(t, base), names(points[:1]), nil); err != nil {
		t.Fatal(err)
	}
	dry := &mortalStore{Store: base.clone()}
	if _, err := from.Copy(t.Context(), openMem(t, dry), names(points), nil); err != nil {
		t.Fatal(err)
	}
	for op := 1; op <= dry.n; op++ {
		for _, after := range []bool{false, true} {
			m := base.clone()
			_, err := from.Copy(t.Context(), openMem(t, &mortalStore{Store: m, dieIn: op, after: after}), names(points), nil)
			what := fmt.Sprintf("killed in change %d (%s), after: %v: %v", op, dry.ops[min(op, len(dry.ops))-1], after, err)
			r := openMem(t, m)
			there, err := r.Points(t.Context(), "a")
			if err != nil || len(there) == 0 {
				t.Fatalf("%s: %v, %v", what, there, err)
			}
			for _, n := range there {
				p, err := r.Point(t.Context(), n)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				wantClean(t, r, p)
			}
			if op%2 == 0 { // what is left may be collected before it goes on
				if _, err := openMem(t, m).GC(t.Context(), GCOptions{Patience: 1, Garbage: 0.01}); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
			if _, err := from.Copy(t.Context(), r, names(points), nil); err != nil {
				t.Fatalf("%s: and again: %v", what, err)
			}
			wantCopies(t, from, r, points, images)
		}
	}
	t.Logf("%d changes", dry.n)
}

func TestCopyBetweenKeys(t *testing.T) {
	plain, one, other := testRepo(t), encryptedRepo(t), encryptedRepo(t)
	for _, r := range []*Repo{one, other} {
		r.dataPackLen, r.nodePackLen = 64<<10, 8<<10
	}
	points, images := history(t, plain)
	first := copied(t, plain, one, names(points)...)
	wantCopies(t, plain, one, points, images)
	there, err := one.Points(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	var again []*Point
	for _, n := range there {
		p, err := one.Point(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		again = append(again, p)
	}
	second := copied(t, one, other, there...)
	wantCopies(t, one, other, again, images)
	if first.Sent != second.Sent || second.Grains != first.Grains {
		t.Errorf("sent %+v, then %+v", first, second)
	}
	// The compressed form is the same.
	a, err := one.Stats(t.Context(), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := other.Stats(t.Context(), false, nil)
	if err != nil || a.Stored-a.Maps != b.Stored-b.Maps || a.Content != b.Content {
		t.Errorf("%+v, %+v, %v", a, b, err)
	}
}
