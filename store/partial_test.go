package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob/faultblob"
)

// part begins a backup, resumes what there is, and hands the disk on. It aborts at the end, as a
// process that died would have.
func part(t *testing.T, r *Repo, size int64, f func(w *Writer, d *DiskWriter, p *Partial)) {
	t.Helper()
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	p, why, err := w.Unfinished(t.Context())
	if err != nil || why != "" {
		t.Fatal(why, err)
	}
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: size, Resume: p.Disk("disk0")})
	if err != nil {
		t.Fatal(err)
	}
	f(w, d, p)
}

func put(t *testing.T, d *DiskWriter, image []byte, off, n int) {
	t.Helper()
	if err := d.Write(t.Context(), int64(off), image[off:off+n]); err != nil {
		t.Fatal(err)
	}
}

func checkpoint(t *testing.T, w *Writer, covered ...Covered) {
	t.Helper()
	if err := w.Checkpoint(t.Context(), []PartialDisk{{Name: "disk0", Covered: covered, ChangeID: "c"}}); err != nil {
		t.Fatal(err)
	}
}

func TestBackupGoesOnFromItsCheckpoint(t *testing.T) {
	r := testRepo(t)
	const size = 20<<20 + 500
	image := noise(5, size)
	var before int64
	part(t, r, size, func(w *Writer, d *DiskWriter, p *Partial) {
		if p != nil {
			t.Fatal("a checkpoint of nothing")
		}
		put(t, d, image, 0, 6<<20)
		put(t, d, image, 9<<20, 1<<20)
		checkpoint(t, w, Covered{0, 6 << 20}, Covered{9 << 20, 1 << 20})
		before = d.Stats().New
		put(t, d, image, 16<<20, 1<<20) // lost
	})
	if n, err := r.Points(t.Context(), "a"); err != nil || len(n) != 0 {
		t.Fatalf("a checkpoint shows as a point: %v, %v", n, err)
	}
	if vms, err := r.VMs(t.Context()); err != nil || len(vms) != 0 {
		t.Fatalf("%v, %v", vms, err)
	}
	var done *Point
	part(t, r, size, func(w *Writer, d *DiskWriter, p *Partial) {
		if p == nil || len(p.Disks) != 1 || len(p.Disks[0].Covered) != 2 || p.Disks[0].ChangeID != "c" || p.Disks[0].Stats.New != before {
			t.Fatalf("%+v", p)
		}
		put(t, d, image, 6<<20, 3<<20)
		image[9<<20]++ // changed since
		put(t, d, image, 9<<20, 64<<10)
		put(t, d, image, 10<<20, size-10<<20)
		var err error
		if done, err = w.Commit(t.Context(), testPoint("disk0")); err != nil {
			t.Fatal(err)
		}
	})
	wantDisk(t, reopen(t, r), done, image)
	wantClean(t, r, done)
	if s := done.Disks[0].Stats; s.Changed != size+k64 || s.New != (size+k64-1)/k64*k64+k64 {
		t.Errorf("stats %+v", s)
	}
	// The point is newer: nothing is to be taken up.
	part(t, r, size, func(_ *Writer, _ *DiskWriter, p *Partial) {
		if p != nil {
			t.Error("the checkpoint of a backup that was finished was taken up")
		}
	})
}

func TestReadAgainWhatIsStoredStoresNothing(t *testing.T) {
	r := testRepo(t)
	image := noise(6, 8<<20)
	part(t, r, 8<<20, func(w *Writer, d *DiskWriter, _ *Partial) {
		put(t, d, image, 0, 6<<20)
		checkpoint(t, w, Covered{0, 6 << 20})
	})
	part(t, r, 8<<20, func(_ *Writer, d *DiskWriter, _ *Partial) {
		was := d.Stats().New
		put(t, d, image, 0, 8<<20)
		if n := d.Stats().New - was; n != 2<<20 {
			t.Errorf("stored %d bytes again", n-2<<20)
		}
	})
}

func TestCheckpointThatCannotBeUsed(t *testing.T) {
	image := noise(7, 4<<20)
	for name, c := range map[string]struct {
		spoil func(t *testing.T, r *Repo, dir string)
		why   string
	}{
		"lost pack": {func(t *testing.T, _ *Repo, dir string) {
			packs, err := filepath.Glob(filepath.Join(dir, "packs/*/*"))
			if err != nil || len(packs) < 2 {
				t.Fatal(packs, err)
			}
			for _, p := range packs {
				if b, err := os.ReadFile(p); err != nil || b[9] == byte(kindNode) {
					continue
				}
				if err := os.Remove(p); err != nil {
					t.Fatal(err)
				}
				return
			}
		}, "missing"},
		"damaged": {func(t *testing.T, _ *Repo, dir string) {
			objects, err := filepath.Glob(filepath.Join(dir, "partial/*/*"))
			if err != nil || len(objects) != 1 {
				t.Fatal(objects, err)
			}
			b, err := os.ReadFile(objects[0])
			b[len(b)/2] ^= 1
			if err = errors.Join(err, os.WriteFile(objects[0], b, 0o600)); err != nil {
				t.Fatal(err)
			}
		}, map[bool]string{false: "hash", true: "damaged"}[testEncrypted]},
		"another parent": {func(t *testing.T, r *Repo, _ string) {
			backup(t, r, DiskOptions{Size: 4 << 20}, write{0, image})
		}, ""},
		"expired": {func(t *testing.T, r *Repo, _ string) {
			p, err := r.newestPartial(t.Context(), r.partialFolder("a"))
			if err != nil {
				t.Fatal(err)
			}
			p.Time, p.Expires = p.Time.Add(time.Second), time.Now().Add(partialGrace-time.Second)
			if err := r.putDocument(t.Context(), r.partialName("a", p.Time), "partial", p); err != nil {
				t.Fatal(err)
			}
		}, ""},
		"under another name": {func(t *testing.T, _ *Repo, dir string) {
			objects, err := filepath.Glob(filepath.Join(dir, "partial/*/*"))
			if err == nil {
				folder, base := filepath.Split(objects[0])
				err = os.Rename(objects[0], filepath.Join(folder, "3"+base[1:]))
			}
			if err != nil {
				t.Fatal(err)
			}
		}, map[bool]string{false: "hash and name", true: "this name"}[testEncrypted]},
	} {
		t.Run(name, func(t *testing.T) {
			r := testRepo(t)
			part(t, r, 4<<20, func(w *Writer, d *DiskWriter, _ *Partial) {
				put(t, d, image, 0, 4<<20)
				checkpoint(t, w, Covered{0, 4 << 20})
			})
			c.spoil(t, r, r.Location())
			w, err := reopen(t, r).Begin(t.Context(), "a")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = w.Abort() }()
			p, why, err := w.Unfinished(t.Context())
			if err != nil || p != nil || !strings.Contains(why, c.why) || (c.why == "") != (why == "") {
				t.Errorf("%+v, %q, %v", p, why, err)
			}
		})
	}
}

func TestCheckpointChecksItsArguments(t *testing.T) {
	r := testRepo(t)
	part(t, r, 1<<20, func(w *Writer, _ *DiskWriter, _ *Partial) {
		for _, bad := range [][]PartialDisk{
			nil, {{Name: "disk1"}}, {{Name: "disk0"}, {Name: "disk0"}},
			{{Name: "disk0", Covered: []Covered{{1, k64}}}}, {{Name: "disk0", Covered: []Covered{{0, 2 << 20}}}},
			{{Name: "disk0", Covered: []Covered{{k64, k64}, {0, k64}}}}, {{Name: "disk0", Covered: []Covered{{0, -k64}}}},
		} {
			if err := w.Checkpoint(t.Context(), bad); !errors.Is(err, ErrInvalid) {
				t.Errorf("%+v: %v", bad, err)
			}
		}
		if err := w.Abort(); err != nil {
			t.Fatal(err)
		}
		if err := w.Checkpoint(t.Context(), []PartialDisk{{Name: "disk0"}}); !errors.Is(err, errFinished) {
			t.Error(err)
		}
	})
}

func FuzzPartial(f *testing.F) {
	doc, err := encodeDocument("partial/a/x", "partial", Partial{VM: "a", Disks: []PartialDisk{{Name: "disk0", Root: Root{Size: 1 << 20, Grain: k64}, Covered: []Covered{{0, k64}}}}})
	if err != nil {
		f.Fatal(err)
	}
	_, body, _ := bytes.Cut(doc, []byte("\n"))
	f.Add(body)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, body []byte) {
		head := "tidemark-partial 1 "
		doc := append(fmt.Appendf(nil, "%s%s\n", head, documentHash("partial/a/x", []byte(head), body)), body...)
		var p Partial
		if decodeDocument("partial/a/x", "partial", doc, &p) != nil || p.validate() != nil {
			return
		}
		for _, d := range p.Disks {
			var n int64
			for _, c := range d.Covered {
				n += c.Len
			}
			if n > d.Root.Size {
				t.Errorf("%+v covers %d bytes", d, n)
			}
		}
	})
}

// doCheckpoints makes one point of crashImage(1), with a checkpoint after every fifth write.
func doCheckpoints(ctx context.Context, a *actor) error {
	w, err := a.repo.Begin(ctx, "a")
	if err != nil {
		return err
	}
	defer func() { _ = w.Abort() }()
	if w.Parent() != nil {
		return nil
	}
	p, why, err := w.Unfinished(ctx)
	if err != nil || why != "" {
		return fmt.Errorf("%s: %w", why, err)
	}
	d, err := w.Disk(ctx, DiskOptions{Name: "disk0", Size: crashSize, Grain: crashGrain, Resume: p.Disk("disk0")})
	if err != nil {
		return err
	}
	image, step := crashImage(1), 256<<10
	var covered []Covered
	if p != nil {
		covered = p.Disks[0].Covered
	}
	at := 0
	if len(covered) > 0 {
		at = int(covered[0].Len)
	}
	for n := 1; at < len(image); n++ {
		if err := d.Write(ctx, int64(at), image[at:at+step]); err != nil {
			return err
		}
		at += step
		if n%5 == 0 {
			if err := w.Checkpoint(ctx, []PartialDisk{{Name: "disk0", Covered: []Covered{{0, int64(at)}}}}); err != nil {
				return err
			}
		}
	}
	point := testPoint("disk0")
	point.Disks[0].ChangeID = "1"
	done, err := w.Commit(ctx, point)
	if err != nil {
		return err
	}
	a.say("point " + done.ID)
	return nil
}

// Always killed at the same moment, long before the end, a backup comes farther each time.
func TestKilledAgainAndAgain(t *testing.T) {
	t.Parallel()
	s := newStage(t, operationOf("backup with checkpoints"))
	run := func(at int64, location string) faultblob.Outcome {
		return faultblob.Run(t, at, "operation", s.op.name, "", location)
	}
	half := run(0, initAt(t)).Moments / 2
	location := s.repo.Location()
	var said []string
	for runs := 0; len(said) == 0; runs++ {
		if runs > 20 {
			t.Fatal("it comes to no end")
		}
		said = run(half, location).Said
	}
	s.check(t, location, append(said, run(0, location).Said...), true)
	if n := len(allNames(t, s.repo)); n != 1 {
		t.Errorf("%d points", n)
	}
}

func TestCheckpointOfAnEncryptedRepository(t *testing.T) {
	r := encryptedRepo(t)
	image := noise(8, 4<<20)
	part(t, r, 4<<20, func(w *Writer, d *DiskWriter, _ *Partial) {
		put(t, d, image, 0, 3<<20)
		checkpoint(t, w, Covered{0, 3 << 20})
	})
	part(t, r, 4<<20, func(w *Writer, d *DiskWriter, p *Partial) {
		if p == nil {
			t.Fatal("nothing was taken up")
		}
		put(t, d, image, 3<<20, 1<<20)
		done, err := w.Commit(t.Context(), testPoint("disk0"))
		if err != nil {
			t.Fatal(err)
		}
		wantDisk(t, r, done, image)
	})
}

func TestOnlyCheckpointsThatCanBeTakenUpLive(t *testing.T) {
	for name, make := range map[string]func(testing.TB) *Repo{"plain": testRepo, "encrypted": encryptedRepo} {
		t.Run(name, func(t *testing.T) { testLivePartials(t, make(t)) })
	}
}

func testLivePartials(t *testing.T, r *Repo) {
	image := noise(8, 4<<20)
	note := func() {
		part(t, r, 4<<20, func(w *Writer, d *DiskWriter, _ *Partial) {
			put(t, d, image, 0, 1<<20)
			checkpoint(t, w, Covered{0, 1 << 20})
			put(t, d, image, 1<<20, 1<<20)
			checkpoint(t, w, Covered{0, 2 << 20})
		})
	}
	objects := func() int {
		all, err := filepath.Glob(filepath.Join(r.Location(), "partial/*/*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	live := func(now time.Time, want int) {
		t.Helper()
		got, err := r.livePartials(t.Context(), now)
		if err != nil || len(got) != want || objects() != want {
			t.Errorf("%d live, %d objects, %v; want %d", len(got), objects(), err, want)
		}
		if want == 1 && got[0].Disks[0].Covered[0].Len != 2<<20 {
			t.Errorf("not the newest: %+v", got[0].Disks)
		}
	}
	live(time.Now(), 0)
	note()
	live(time.Now(), 1)
	live(time.Now().Add(PartialLife-time.Hour), 1)
	live(time.Now().Add(PartialLife+time.Hour), 0)
	note()
	backup(t, r, DiskOptions{Size: 4 << 20}, write{0, image})
	live(time.Now(), 0)
	note() // of the point
	live(time.Now(), 1)
	part(t, r, 4<<20, func(_ *Writer, _ *DiskWriter, p *Partial) {
		if p == nil || p.Parent == "" {
			t.Errorf("%+v was not taken up", p)
		}
	})
	all, err := filepath.Glob(filepath.Join(r.Location(), "partial/*/*"))
	if err == nil {
		err = os.WriteFile(all[0], []byte("damaged"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	live(time.Now(), 0)
}
