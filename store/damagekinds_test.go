package store

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// kindOfObject says what an object is, by its name and, of a pack, its header.
func kindOfObject(name string, content []byte) string {
	folder, rest, _ := strings.Cut(name, "/")
	switch folder {
	case "packs":
		kind := packKind(content[9]).String() + " pack"
		if strings.Contains(rest, ".") {
			kind += ", later generation"
		}
		return kind
	case "sessions", "gc":
		if _, suffix, ok := strings.Cut(rest, "."); ok {
			return folder + " " + suffix
		}
	}
	return folder
}

// everyKind makes a repository with objects of every kind, and two of each kind where there can be. The second VM shares nothing
// with the first.
func everyKind(t *testing.T, r *Repo) (points []*Point, images [][]byte) {
	t.Helper()
	const grains = 40
	image := noise(1, grains*4096)
	first := backupOf(t, r, "a", grains*4096, write{0, image})
	over := noise(2, 12*4096)
	for g := range 12 { // in each pack some
		copy(image[g*3*4096:], over[g*4096:][:4096])
	}
	var writes []write
	for g := range 12 {
		writes = append(writes, write{int64(g) * 3 * 4096, over[g*4096:][:4096]})
	}
	points = append(points, backupOf(t, r, "a", grains*4096, writes...))
	images = append(images, image)
	// Of another one all nodes but one stay.
	if _, err := r.Forget(t.Context(), []PointName{first.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	wide := noise(3, 20*4096)
	const size = 5 << 20
	var spread []write
	for g := range 20 {
		spread = append(spread, write{int64(g) << 18, wide[g*4096:][:4096]})
	}
	before := backupOf(t, r, "a", size, spread...)
	spread[0].p = noise(4, 4096)
	points = append(points, backupOf(t, r, "a", size, spread[0]))
	disk := make([]byte, size)
	copy(disk, image)
	for _, w := range spread {
		copy(disk[w.off:], w.p)
	}
	images = append(images, disk)
	if _, err := r.Forget(t.Context(), []PointName{before.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	gc(t, r, GCOptions{Garbage: 1e-9})
	for n := range uint64(2) {
		image = noise(10+n, 20*4096)
		points = append(points, backupOf(t, r, "b", 20*4096, write{0, image}))
		images = append(images, image)
	}
	for i, p := range points[:2] {
		note := Damage{Found: time.Now(), Lost: []Lost{{Object: "packs/x", Disk: "disk0", Len: 4096}}}
		name := newDocumentName(gcPrefix, time.Now())
		salvaged := noise(uint64(20+i), 3000)
		err := errors.Join(
			r.Pin(t.Context(), p.Name(), "kept"),
			r.putDocument(t.Context(), r.damageObject(p.Name(), 1), "damage", note),
			r.putDocument(t.Context(), name, "gc", condemnedDoc{Packs: []packAt{{Pack: PackID{byte(i)}}}}),
			r.putDocument(t.Context(), name+waitSuffix, "gc-wait", waitDoc{Sessions: []string{}}),
			r.putDocument(t.Context(), name+doneSuffix, "gc-done", doneDoc{Time: time.Now()}),
			r.blobs.Put(t.Context(), salvagePrefix+newPackID().String()+".1-0123456789abcdef", bytes.NewReader(salvaged), 3000),
		)
		if err != nil {
			t.Fatal(err)
		}
		w, err := r.Begin(t.Context(), string("yz"[i]))
		if err != nil {
			t.Fatal(err)
		}
		d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 4 << 20})
		if err != nil {
			t.Fatal(err)
		}
		put(t, d, noise(uint64(30+i), 1<<20), 0, 1<<20)
		checkpoint(t, w, Covered{0, 1 << 20})
		if err := w.Abort(); err != nil {
			t.Fatal(err)
		}
	}
	return points, images
}

// TestDamageOfEveryKindOfObject damages an object of every kind in every way. It is told by whoever reads it, with the name of
// the object and, of packs, the extent of each disk that suffers; all else can be read.
func TestDamageOfEveryKindOfObject(t *testing.T) {
	t.Parallel()
	r := testRepo(t)
	points, images := everyKind(t, r)
	byKind := map[string][]string{}
	contents := map[string][]byte{}
	needs := map[string][]bool{} // which points a pack is needed by
	for _, name := range objectsAndDone(t, r) {
		b, err := os.ReadFile(filepath.Join(r.Location(), name))
		if err != nil {
			t.Fatal(err)
		}
		contents[name] = b
		kind := kindOfObject(name, b)
		if strings.HasSuffix(kind, "generation") || strings.HasSuffix(kind, "pack") {
			needed := make([]bool, len(points))
			for i, p := range points {
				_, needed[i] = packsOf(t, r, p)[packOf(t, strings.SplitN(name, ".", 2)[0])]
			}
			if !slices.Contains(needed, true) {
				continue // a checkpoint's
			}
			needs[name] = needed
		}
		byKind[kind] = append(byKind[kind], name)
	}
	want := []string{
		"config", "damaged", "gc", "gc done", "gc wait", "data pack", "data pack, later generation", "node pack", "node pack, later generation",
		"partial", "pins", "points", "salvage", "sessions", "sessions done", "sessions end",
	}
	if testEncrypted {
		want = append(want, "keys")
	}
	if have := slices.Sorted(maps.Keys(byKind)); !slices.Equal(have, slices.Sorted(slices.Values(want))) {
		t.Fatalf("kinds of objects: %q", have)
	}
	for kind, names := range byKind {
		name := names[0]
		whole := contents[name]
		ways := map[string]func() map[string][]byte{
			"lost": func() map[string][]byte { return map[string][]byte{name: nil} },
		}
		for _, n := range []int{0, 1, len(whole) / 2, len(whole) - 1} {
			ways["cut to "+string(rune('0'+len(ways)))] = func() map[string][]byte { return map[string][]byte{name: append([]byte{}, whole[:n]...)} }
		}
		ways["longer"] = func() map[string][]byte { return map[string][]byte{name: append(slices.Clone(whole), 0)} }
		for i := range 12 {
			at := i * len(whole) / 12
			if i == 11 {
				at = len(whole) - 1
			}
			ways["flipped "+string(rune('a'+i))] = func() map[string][]byte {
				b := slices.Clone(whole)
				b[at] ^= 1 << (i % 8)
				return map[string][]byte{name: b}
			}
		}
		if len(names) > 1 {
			ways["swapped"] = func() map[string][]byte {
				return map[string][]byte{name: contents[names[1]], names[1]: whole}
			}
		}
		for way, damage := range ways {
			changed := damage()
			for n, b := range changed {
				file := filepath.Join(r.Location(), n)
				err := os.Remove(file)
				if err == nil && b != nil {
					err = os.WriteFile(file, b, 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			d := damaged{r, kind, way, slices.Sorted(maps.Keys(changed)), points, images, needs}
			d.check(t)
			for n := range changed {
				if err := os.WriteFile(filepath.Join(r.Location(), n), contents[n], 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if t.Failed() {
				t.Fatalf("%s, %s: %v", kind, way, d.names)
			}
		}
		t.Logf("%s (%d objects): %d kinds of damage", kind, len(names), len(ways))
	}
}

// objectsAndDone is objects with those that say all by being there.
func objectsAndDone(t *testing.T, r *Repo) []string {
	t.Helper()
	all, err := r.names(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// damaged is a repository in which the objects of names are damaged.
type damaged struct {
	r      *Repo
	kind   string
	way    string
	names  []string
	points []*Point
	images [][]byte
	needs  map[string][]bool
}

// tells checks that an error is of damage and names one of the objects.
func (d *damaged) tells(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrCorrupt) || !slices.ContainsFunc(d.names, func(n string) bool { return strings.Contains(err.Error(), n) }) {
		t.Errorf("%v", err)
	}
}

func (d *damaged) check(t *testing.T) {
	t.Helper()
	lost := d.way == "lost"
	r, err := testOpen(t.Context(), d.r.Location())
	switch d.kind {
	case "config":
		if !errors.Is(err, ErrNotRepository) && !errors.Is(err, ErrCorrupt) || !lost && !strings.Contains(err.Error(), "config") {
			t.Errorf("open: %v", err)
		}
		return
	case "keys":
		if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "keys/") {
			t.Errorf("open: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	d.checkPoints(t, r)
	switch d.kind {
	case "sessions", "sessions end":
		if _, err := r.sessions(t.Context()); !lost {
			d.tells(t, err)
		} else if err != nil {
			t.Error(err)
		}
	case "gc", "gc wait", "gc done":
		if _, err := r.verdicts(t.Context()); !lost {
			d.tells(t, err)
		} else if err != nil {
			t.Error(err)
		}
	case "partial":
		some := ""
		for _, vm := range []string{"y", "z"} {
			w, err := r.Begin(t.Context(), vm)
			if err != nil {
				t.Fatal(err)
			}
			p, why, err := w.Unfinished(t.Context())
			if err != nil || p != nil && slices.Contains(d.names, p.object) {
				t.Errorf("%+v, %v", p, err)
			}
			some += why
			if err := w.Abort(); err != nil {
				t.Fatal(err)
			}
			for _, suffix := range []string{"", endSuffix} {
				if err := r.removed(t.Context(), w.writing.name+suffix); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !lost && !strings.Contains(some, d.names[0]) {
			t.Errorf("%q", some)
		}
	case "pins":
		pins, err := r.Pins(t.Context(), "a")
		notes := 0
		for _, p := range pins {
			if strings.Contains(p.Note, "damaged") {
				notes++
			}
		}
		if want := len(d.names); err != nil || !lost && (notes != want || len(pins) != 2) || lost && (notes != 0 || len(pins) != 1) {
			t.Errorf("pins: %+v, %v", pins, err)
		}
	case "damaged":
		known, err := r.Damages(t.Context(), "a")
		told := 0
		for _, k := range known {
			if len(k.Lost) == 1 && slices.Contains(d.names, k.Lost[0].Object) {
				told++
			}
		}
		if want := len(d.names); err != nil || !lost && (told != want || len(known) != 2) || lost && (told != 0 || len(known) != 1) {
			t.Errorf("notes: %+v, %v", known, err)
		}
	}
}

// checkPoints reads all points; what suffers must be told, and nothing else.
func (d *damaged) checkPoints(t *testing.T, r *Repo) {
	t.Helper()
	suffered := false
	for i, p := range d.points {
		object := r.pointObject(p.Name())
		if d.kind == "points" && slices.Contains(d.names, object) {
			_, err := r.Point(t.Context(), p.Name())
			if d.way == "lost" {
				if !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
			} else {
				d.tells(t, err)
			}
			continue
		}
		m, err := r.Map(p.Disks[0].Root)
		if err != nil {
			t.Fatal(err)
		}
		bad := map[int64]bool{}
		buf := make([]byte, 4096)
		for g := range m.Grains() {
			ref, err := m.Lookup(t.Context(), g)
			if err == nil {
				err = r.ReadGrain(t.Context(), ref, buf)
			}
			if err != nil {
				bad[g] = true
				d.tellsPack(t, err.Error(), err)
				if !allZero(buf) && ref.Hash != (Hash{}) {
					t.Error("bytes came with the error")
				}
			} else if !bytes.Equal(buf, d.images[i][g*4096:][:4096]) {
				t.Fatalf("%s: grain %d is wrong", p.Name(), g)
			}
		}
		rep, err := r.Verify(t.Context(), p, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		told := map[int64]bool{}
		for _, q := range rep.Problems {
			d.tellsPack(t, q.Object, nil)
			for g := q.Off / 4096; g < (q.Off+q.Len+4095)/4096; g++ {
				told[g] = true
			}
		}
		if !maps.Equal(told, bad) {
			t.Errorf("%s: %d grains can't be read, of %d it is told", p.Name(), len(bad), len(told))
		}
		need := slices.ContainsFunc(d.names, func(n string) bool { return d.needs[n] != nil && d.needs[n][i] })
		if len(bad) > 0 && !need {
			t.Errorf("%s suffers and does not need it", p.Name())
		}
		suffered = suffered || len(bad) > 0
	}
	if isPack := strings.HasPrefix(d.names[0], packPrefix); suffered != isPack {
		t.Errorf("points suffer: %v", suffered)
	}
}

// tellsPack looks that a damaged pack is named; of one that is lost, no generation is.
func (d *damaged) tellsPack(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, ErrCorrupt) || !slices.ContainsFunc(d.names, func(n string) bool {
		if d.way == "lost" {
			n, _, _ = strings.Cut(n, ".")
		}
		return strings.Contains(what, n)
	}) {
		t.Errorf("%s, %v", what, err)
	}
}
