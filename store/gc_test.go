package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

func gc(t *testing.T, r *Repo, o GCOptions) GCReport {
	t.Helper()
	rep, err := r.GC(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func TestCollectionDeletesAndCompacts(t *testing.T) {
	r := testRepo(t)
	// Half of the first pack is overwritten, and all of another disk's.
	image := noise(1, 32*k64)
	p1 := backup(t, r, DiskOptions{Size: int64(len(image))}, write{0, image})
	second := slices.Clone(image)
	writes := []write{}
	for g := 0; g < 32; g += 2 {
		p := noise(uint64(100+g), k64)
		copy(second[g*k64:], p)
		writes = append(writes, write{int64(g) * k64, p})
	}
	p2 := backup(t, r, DiskOptions{Size: int64(len(image))}, writes...)
	if rep := gc(t, r, GCOptions{}); rep.Garbage != 0 || rep.Freed != 0 || rep.Points != 2 {
		t.Errorf("nothing is garbage: %+v", rep)
	}
	if left := append(objectsBelow(t, r, "sessions/"), objectsBelow(t, r, "gc/")...); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := r.Forget(t.Context(), []PointName{p1.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	look := gc(t, r, GCOptions{DryRun: true})
	rep := gc(t, r, GCOptions{})
	if rep.Freed < 16*k64 || rep.Freed > 17*k64 || rep.Left > 0 || look.Deleted != rep.Deleted || look.Compacted != rep.Compacted {
		t.Errorf("freed %+v, dry run %+v", rep, look)
	}
	// Also through an index that was read before.
	wantDisk(t, r, p2, second)
	wantClean(t, reopen(t, r), p2)
	if rep := gc(t, r, GCOptions{}); rep.Garbage != 0 || rep.Freed != 0 {
		t.Errorf("a second run finds %+v", rep)
	}
	// What was dropped is stored anew when it is wanted again.
	p3 := backup(t, r, DiskOptions{Size: int64(len(image)), Dedup: true}, write{0, image})
	wantDisk(t, r, p3, image)
	wantClean(t, r, p3)
}

func TestLargePacksAreCompacted(t *testing.T) {
	r := testRepo(t)
	r.dataPackLen = 1 << 20
	image := noise(1, 32*k64)
	p1 := backup(t, r, DiskOptions{Size: int64(len(image))}, write{0, image})
	p2 := backup(t, r, DiskOptions{Size: int64(len(image))}, write{0, noise(2, 5*k64)}, write{20 * k64, text(3, 3*k64)})
	copy(image, noise(2, 5*k64))
	copy(image[20*k64:], text(3, 3*k64))
	if _, err := r.Forget(t.Context(), []PointName{p1.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	if rep := gc(t, r, GCOptions{Garbage: 0.9}); rep.Compacted != 0 || rep.Garbage == 0 {
		t.Errorf("below the threshold: %+v", rep)
	}
	rep := gc(t, r, GCOptions{Garbage: 0.1})
	padding := int64(0)
	if r.Encrypted() {
		padding = k64 // at most, of two packs
	}
	if rep.Compacted != 2 || rep.Freed < 8*k64-padding || rep.Freed > 8*k64+padding {
		t.Errorf("compacted: %+v", rep)
	}
	if n := packFiles(t, r); !slices.ContainsFunc(n, func(s string) bool { return strings.HasSuffix(s, ".2") }) {
		t.Errorf("packs %v", n)
	}
	wantDisk(t, r, p2, image)
	r = reopen(t, r)
	wantDisk(t, r, p2, image)
	wantClean(t, r, p2)
}

func TestCollectionRefusesWhatItCannotFollow(t *testing.T) {
	for _, what := range []string{"node", "point", "session", "stray"} {
		t.Run(what, func(t *testing.T) {
			r := testRepo(t)
			size := int64(40 << 20)
			p1 := backup(t, r, DiskOptions{Size: size}, write{0, noise(1, 20*k64)}, write{30 << 20, noise(2, 20*k64)})
			p2 := backup(t, r, DiskOptions{Size: size}, write{0, noise(3, 20*k64)})
			if _, err := r.Forget(t.Context(), []PointName{p1.Name()}, nil); err != nil {
				t.Fatal(err)
			}
			damage := r.pointObject(p2.Name())
			switch what {
			case "node":
				damage = packName(p2.Disks[0].Root.Ref.Pack)
			case "session":
				w, err := r.Begin(t.Context(), "b")
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = w.Abort() }()
				damage = w.writing.name
			case "stray":
				damage = "points/a/of-a-newer-program"
				if err := r.blobs.Put(t.Context(), damage, bytes.NewReader(make([]byte, 100)), 100); err != nil {
					t.Fatal(err)
				}
			}
			before := packFiles(t, r)
			undo := flip(t, filepath.Join(r.Location(), damage), 8*60)
			_, err := reopen(t, r).GC(t.Context(), GCOptions{Garbage: 0.01})
			if err == nil || !strings.Contains(err.Error(), damage) || what != "stray" && !errors.Is(err, ErrCorrupt) {
				t.Errorf("gc: %v", err)
			}
			if after := packFiles(t, r); !slices.Equal(before, after) {
				t.Errorf("packs %v, then %v", before, after)
			}
			undo()
			if what == "stray" {
				if err := os.Remove(filepath.Join(r.Location(), damage)); err != nil {
					t.Fatal(err)
				}
			}
			if rep := gc(t, reopen(t, r), GCOptions{Garbage: 0.01}); rep.Garbage == 0 {
				t.Errorf("after the damage was undone: %+v", rep)
			}
		})
	}
}

func TestRunningBackupIsWaitedFor(t *testing.T) {
	r := testRepo(t)
	p1 := backup(t, r, DiskOptions{Size: 4 << 20}, write{0, noise(1, 20*k64)})
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	// Its parent goes, and with it what it is about to share.
	if _, err := r.Forget(t.Context(), []PointName{p1.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	other := reopen(t, r)
	rep := gc(t, other, GCOptions{})
	if rep.Freed != 0 || !slices.Equal(rep.Waiting, []string{w.writing.name}) && rep.Left > 0 {
		t.Errorf("beside a running backup: %+v", rep)
	}
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), 30*k64, noise(2, 3*k64)); err != nil {
		t.Fatal(err)
	}
	p2, err := w.Commit(t.Context(), testPoint("disk0"))
	if err != nil {
		t.Fatal(err)
	}
	gc(t, other, GCOptions{})
	gc(t, other, GCOptions{})
	wantClean(t, reopen(t, r), p2)
	want := make([]byte, 4<<20)
	copy(want, noise(1, 20*k64))
	copy(want[30*k64:], noise(2, 3*k64))
	wantDisk(t, r, p2, want)
}

func TestBackupThatWasGivenUpCannotCommit(t *testing.T) {
	r := testRepo(t)
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), 0, noise(2, 30*k64)); err != nil {
		t.Fatal(err)
	}
	rep := gc(t, reopen(t, r), GCOptions{Patience: time.Nanosecond})
	if !slices.Equal(rep.GivenUp, []string{w.writing.name}) {
		t.Errorf("given up: %+v", rep)
	}
	if _, err := w.Commit(t.Context(), testPoint("disk0")); !errors.Is(err, ErrGivenUp) {
		t.Errorf("Commit: %v", err)
	}
	if n, err := r.Points(t.Context(), "a"); err != nil || len(n) != 0 {
		t.Errorf("points: %v, %v", n, err)
	}
}

func TestDeadProcessIsGivenUp(t *testing.T) {
	r := testRepo(t)
	forgotten := backup(t, r, DiskOptions{Size: 4 << 20}, write{0, noise(1, 3*k64)})
	if _, err := r.Forget(t.Context(), []PointName{forgotten.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	p := thisProcess()
	p.Start-- // another process of this PID, before
	s := sessionDoc{VM: "a", Start: time.Now(), Deadline: time.Now().Add(time.Hour), Process: p}
	if err := r.putDocument(t.Context(), "sessions/20260101T000000Z-0123456789abcdef", "session", s); err != nil {
		t.Fatal(err)
	}
	// A dry run says what a run does.
	s.Roots = rootRefs(forgotten)
	if err := r.putDocument(t.Context(), "sessions/20260101T000000Z-0123456789abcdee", "session", s); err != nil {
		t.Fatal(err)
	}
	if dry := gc(t, r, GCOptions{DryRun: true}); dry.Garbage == 0 {
		t.Errorf("what only a dead backup's parent needs is not garbage: %+v", dry)
	}
	if rep := gc(t, r, GCOptions{}); len(rep.GivenUp) != 2 || rep.Deleted == 0 {
		t.Errorf("%+v", rep)
	}
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), 0, noise(2, 3*k64)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.data.flush(t.Context()), w.Abort()); err != nil {
		t.Fatal(err)
	}
	if rep := gc(t, r, GCOptions{}); len(rep.GivenUp) != 0 || rep.Deleted == 0 {
		t.Errorf("%+v", rep)
	}
	for _, other := range []process{{}, {Boot: "x", Namespace: p.Namespace, PID: 1 << 30}, {Boot: p.Boot, Namespace: "x", PID: 1 << 30}, thisProcess()} {
		if other.isGone() {
			t.Errorf("%+v is said to be gone", other)
		}
	}
}

// A writer's rights may end at creating objects.
func TestWriterNeedsNoRightToDelete(t *testing.T) {
	m := newStill(t)
	m.forbid = func(op, name string) error {
		if op == "delete" {
			return fmt.Errorf("delete %s: access denied", name)
		}
		return nil
	}
	r := openMem(t, m)
	image := noise(1, 100*4096)
	p1 := backup(t, r, DiskOptions{Size: int64(len(image)), Grain: 4096}, write{0, image})
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Abort(); err != nil {
		t.Fatal(err)
	}
	p2 := backup(t, r, DiskOptions{Size: int64(len(image)), Grain: 4096, Dedup: true}, write{0, noise(2, 4096)})
	if _, err := r.Forget(t.Context(), []PointName{p1.Name()}, nil); err == nil {
		t.Error("a point was forgotten")
	}
	if err := r.Pin(t.Context(), p1.Name(), ""); err != nil {
		t.Errorf("pin: %v", err)
	}
	if _, err := r.GC(t.Context(), GCOptions{}); err == nil {
		t.Error("sessions were deleted")
	}
	wantClean(t, r, p1)
	wantClean(t, r, p2)
	// Somebody else may delete; the writer goes on.
	m.forbid = nil
	gc(t, openMem(t, m), GCOptions{})
	wantClean(t, openMem(t, m), p2)
}

// appearing is a store whose first listing of documents of collections began before do and
// still shows what do created of which the names end with suffix: a listing shows or hides what
// changes meanwhile.
type appearing struct {
	*memStore
	do     func()
	suffix string
}

func (a *appearing) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	do := a.do
	if prefix != gcPrefix || do == nil {
		return a.memStore.List(ctx, prefix)
	}
	a.do = nil
	return func(yield func(blob.Info, error) bool) {
		before := a.names(prefix)
		do()
		for info, err := range a.memStore.List(ctx, prefix) {
			seen := err != nil || slices.Contains(before, info.Name) || strings.HasSuffix(info.Name, a.suffix)
			if seen && !yield(info, err) {
				return
			}
		}
	}
}

// Another collection makes its document and what it waits for while this one lists them, and the listing
// shows only the second. That is no leftover: without the document writers would take
// for good what is being deleted.
func TestDocumentThatAppearsWhileListedStays(t *testing.T) {
	for _, suffix := range []string{waitSuffix, doneSuffix} {
		a := &appearing{memStore: newMemStore(1), suffix: suffix}
		a.be(true)
		r, err := initOn(t.Context(), a, "mem", testNew()...)
		if err != nil {
			t.Fatal(err)
		}
		other := newDocumentName(gcPrefix, time.Now())
		shown := false
		a.do = func() {
			doc := condemnedDoc{Time: time.Now().UTC(), Packs: []packAt{{Pack: PackID{1}}}}
			err := errors.Join(
				r.putDocument(t.Context(), other, "gc", doc),
				r.putDocument(t.Context(), other+waitSuffix, "gc-wait", waitDoc{Sessions: []string{}}),
				r.putDocument(t.Context(), other+doneSuffix, "gc-done", doneDoc{Time: time.Now().UTC()}),
			)
			shown = err == nil
			if err != nil {
				t.Error(err)
			}
		}
		c, err := r.newCollection(GCOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.pending(t.Context()); err != nil || !shown {
			t.Fatalf("pending: %v, listed: %v", err, shown)
		}
		if left := a.names(gcPrefix); len(left) != 3 {
			t.Errorf("a listing that shows only %s: left are %v", suffix, left)
		}
	}
}

func FuzzDocument(f *testing.F) {
	doc, err := encodeDocument("x", "session", sessionDoc{VM: "a"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte("tidemark-gc 1 x\n{}"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		var s sessionDoc
		var e sessionEnd
		var c condemnedDoc
		var p Pin
		for kind, v := range map[string]any{"session": &s, "session-end": &e, "gc": &c, "pin": &p} {
			if err := decodeDocument("x", kind, doc, v); err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Errorf("%s: %v", kind, err)
			}
		}
	})
}
