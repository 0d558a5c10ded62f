package store

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func booted() Check {
	return Check{Time: time.Now(), Verdict: VerdictBooted, Reason: "login prompt", Took: 3 * time.Second, Tool: "test"}
}

func failed() Check {
	c := booted()
	c.Verdict, c.Reason = VerdictFailed, "kernel panic"
	return c
}

var sight = Seen{Line: "xyzzy-host login:", Console: []byte("the guest's xyzzy\nxyzzy-host login:"), Screen: []byte("\x89PNG xyzzy")}

func keep(t testing.TB, r *Repo, p *Point, c Check) Check {
	t.Helper()
	kept, err := r.KeepCheck(t.Context(), p.Name(), c, sight)
	if err != nil {
		t.Fatal(err)
	}
	return kept
}

func TestNewestCheckCounts(t *testing.T) {
	t.Parallel()
	for _, r := range []*Repo{testRepo(t), encryptedRepo(t)} {
		old := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, 1<<16)})
		mid := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(2, 1<<16)})
		last := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(3, 1<<16)})
		ref := old.VM + "@proven"
		if _, err := r.Find(t.Context(), ref); !errors.Is(err, ErrNotFound) {
			t.Fatalf("without checks: %v", err)
		}
		wantProven := func(want *Point) {
			t.Helper()
			p, damage, err := r.FindWhole(t.Context(), ref)
			if err != nil || damage != nil || p.ID != want.ID {
				t.Fatalf("proven: %+v, %v, %v; want %s", p, damage, err, want.ID)
			}
			if n, err := r.FindName(t.Context(), ref); err != nil || n != want.Name() {
				t.Fatalf("by name: %v, %v; want %s", n, err, want.Name())
			}
		}
		keep(t, r, old, booted())
		keep(t, r, last, failed())
		wantProven(old)
		first := keep(t, r, mid, booted())
		wantProven(mid)
		second := keep(t, r, mid, failed())
		if first.Number != 1 || second.Number != 2 {
			t.Errorf("numbers %d, %d", first.Number, second.Number)
		}
		wantProven(old)
		keep(t, r, mid, booted())
		wantProven(mid)

		checks, err := r.Checks(t.Context(), old.VM)
		if err != nil {
			t.Fatal(err)
		}
		if len(checks) != 3 || checks[mid.Name()].Number != 3 || checks[last.Name()].Verdict != VerdictFailed {
			t.Errorf("checks %+v", checks)
		}
		seen, err := r.SeenBy(t.Context(), mid.Name(), checks[mid.Name()])
		if err != nil || !bytes.Equal(seen.Console, sight.Console) || !bytes.Equal(seen.Screen, sight.Screen) || seen.Line != sight.Line {
			t.Errorf("seen %+v, %v", seen, err)
		}

		// A point that is known to be damaged is not offered.
		if err := r.noteDamage(t.Context(), mid.Name(), Damage{Lost: []Lost{{Object: "packs/x", What: "gone"}}}); err != nil {
			t.Fatal(err)
		}
		if p, _, err := r.FindWhole(t.Context(), ref); err != nil || p.ID != old.ID {
			t.Errorf("with damage: %+v, %v", p, err)
		}
	}
}

func TestChecksGoWithTheirPoint(t *testing.T) {
	t.Parallel()
	r := testRepo(t)
	a := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, 1<<16)})
	b := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(2, 1<<16)})
	keep(t, r, a, booted())
	keep(t, r, a, booted())
	keep(t, r, b, booted())
	if _, err := r.Forget(t.Context(), []PointName{a.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, o := range objects(t, r) {
		if strings.HasPrefix(o, checkPrefix) {
			left = append(left, o)
		}
	}
	if len(left) != 2 || !strings.Contains(left[0], b.ID) || !strings.Contains(left[1], b.ID) {
		t.Errorf("left: %v", left)
	}
	if _, err := r.KeepCheck(t.Context(), a.Name(), booted(), sight); !errors.Is(err, ErrNotFound) {
		t.Errorf("check of a forgotten point: %v", err)
	}
	if got := len(objects(t, r)); got == 0 {
		t.Fatal("nothing is there")
	}
	for _, o := range objects(t, r) {
		if strings.HasPrefix(o, checkPrefix) && strings.Contains(o, a.ID) {
			t.Errorf("left of a forgotten point: %s", o)
		}
	}
}

// What was seen is content: a writer's key must not read it.
func TestWriterKeyCantSeeWhatWasSeen(t *testing.T) {
	t.Parallel()
	full := encryptedRepo(t)
	p := backup(t, full, DiskOptions{Size: 1 << 20}, write{0, noise(1, 1<<16)})
	keep(t, full, p, booted())
	key, _ := addFile(t, full, WriterKey)
	w := openWith(t, full, key)
	checks, err := w.Checks(t.Context(), p.VM)
	if err != nil || checks[p.Name()].Verdict != VerdictBooted {
		t.Fatalf("checks %+v, %v", checks, err)
	}
	if _, err := w.SeenBy(t.Context(), p.Name(), checks[p.Name()]); !errors.Is(err, ErrWriterKey) {
		t.Errorf("a writer's key sees: %v", err)
	}
	mine, err := w.KeepCheck(t.Context(), p.Name(), failed(), sight)
	if err != nil {
		t.Fatal(err)
	}
	if seen, err := full.SeenBy(t.Context(), p.Name(), mine); err != nil || seen.Line != sight.Line {
		t.Errorf("%+v, %v", seen, err)
	}
	for _, o := range objects(t, full) {
		b, err := os.ReadFile(filepath.Join(full.Location(), o))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("xyzzy")) {
			t.Errorf("%s holds what was seen in the clear", o)
		}
	}
}

func TestDamagedCheckProvesNothing(t *testing.T) {
	t.Parallel()
	for _, r := range []*Repo{testRepo(t), encryptedRepo(t)} {
		p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, 1<<16)})
		c := keep(t, r, p, booted())
		verdict := filepath.Join(r.Location(), r.checkObject(p.Name(), 1))
		for _, name := range []string{verdict, verdict + seenSuffix} {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for bit := 0; bit < len(b)*8; bit += 41 {
				undo := flip(t, name, bit)
				checks, err := r.Checks(t.Context(), p.VM)
				if err != nil {
					t.Fatal(err)
				}
				_, seenErr := r.SeenBy(t.Context(), p.Name(), c)
				if name == verdict && checks[p.Name()].Verdict != VerdictUnknown || name != verdict && seenErr == nil {
					t.Fatalf("bit %d of %s was not noticed: %+v", bit, name, checks)
				}
				undo()
			}
		}
		if _, err := r.Find(t.Context(), p.VM+"@proven"); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzCheckNames(f *testing.F) {
	f.Add("checks/vm/20260102T030405.000000006Z-0123456789abcdef.1")
	f.Add("checks/vm/20260102T030405.000000006Z-0123456789abcdef.12.seen")
	f.Add("checks/vm/20260102T030405.000000006Z-0123456789abcdef.01")
	r := &reader{}
	f.Fuzz(func(t *testing.T, name string) {
		n, number, seen, ok := r.parseCheckObject(name)
		if !ok {
			return
		}
		again := r.checkObject(n, number)
		if seen {
			again += seenSuffix
		}
		if again != name {
			t.Errorf("%q was read as %q", name, again)
		}
	})
}
