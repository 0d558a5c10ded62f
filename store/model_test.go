package store

import (
	"bytes"
	"math"
	"os"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestModel writes random points and compares everything that can be read with
// plain byte slices.
func TestModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			rt.Fatal(err)
		}
		r, err := testInit(t.Context(), dir)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = r.Close() }()
		r.dataPackLen, r.nodePackLen = 32<<10, 4<<10
		grain := rapid.SampledFrom([]int{4 << 10, 8 << 10}).Draw(rt, "grain")
		// From less than one leaf to three levels.
		size := int64(rapid.SampledFrom([]int{1, 4096, 4097, 100_000, 262_144, 262_145, 1_000_000, 17_000_000}).Draw(rt, "size"))
		image := make([]byte, size)
		count := rapid.IntRange(1, 5).Draw(rt, "points")
		points, images := make([]*Point, 0, count), make([][]byte, 0, count)
		for range count {
			if rapid.IntRange(0, 5).Draw(rt, "resize") == 0 {
				size = max(1, size+int64(rapid.IntRange(-600_000, 600_000).Draw(rt, "by")))
				image = slices.Clone(image[:min(size, int64(len(image)))])
				image = append(image, make([]byte, size-int64(len(image)))...)
			}
			image = slices.Clone(image)
			p := modelPoint(rt, t, r, image, grain)
			points, images = append(points, p), append(images, image)
		}
		r = reopen(t, r)
		listed, err := r.Points(t.Context(), "a")
		if err != nil || len(listed) != len(points) {
			rt.Fatalf("Points: %d of %d, %v", len(listed), len(points), err)
		}
		for i, p := range points {
			if listed[i] != p.Name() {
				rt.Fatalf("point %d is listed as %v, want %v", i, listed[i], p.Name())
			}
			checkImage(rt, t, r, p, images[i], grain)
			for k, old := range points {
				from := rapid.Int64Range(-1, int64(len(images[i])/grain)+1).Draw(rt, "diff from")
				checkDiff(rt, t, r, p, old, images[i], images[k], grain, from, from+rapid.Int64Range(0, 1000).Draw(rt, "diff length"))
				checkDiff(rt, t, r, p, old, images[i], images[k], grain, 0, math.MaxInt64)
			}
		}
		// Older points are not needed by newer ones.
		for _, p := range points[:len(points)-1] {
			if err := r.blobs.Delete(t.Context(), r.pointObject(p.Name())); err != nil {
				rt.Fatal(err)
			}
		}
		checkImage(rt, t, reopen(t, r), points[len(points)-1], image, grain)
	})
}

func modelPoint(rt *rapid.T, t *testing.T, r *Repo, image []byte, grain int) *Point {
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		rt.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	d, err := w.Disk(t.Context(), DiskOptions{
		Name: "disk0", Size: int64(len(image)), Grain: grain,
		Dedup: rapid.Bool().Draw(rt, "dedup"),
	})
	if err != nil {
		rt.Fatal(err)
	}
	var before []byte
	if p := w.Parent(); p != nil {
		if before, err = readDisk(t.Context(), r, p.Disks[0].Root); err != nil {
			rt.Fatal(err)
		}
	}
	grains := (len(image) + grain - 1) / grain
	for range rapid.IntRange(0, 12).Draw(rt, "writes") {
		from := rapid.IntRange(0, grains-1).Draw(rt, "from")
		n := rapid.SampledFrom([]int{1, 1, 2, 5, 64, 70, 200, grains}).Draw(rt, "n")
		part := image[from*grain : min((from+n)*grain, len(image))]
		switch rapid.IntRange(0, 4).Draw(rt, "kind") {
		case 0:
			clear(part)
		case 1: // as it was
			clear(part)
			if from*grain < len(before) {
				copy(part, before[from*grain:])
			}
		case 2: // repeats
			for i := range part {
				part[i] = byte(i % 7)
			}
		default:
			copy(part, noise(rapid.Uint64Range(0, 20).Draw(rt, "seed"), len(part)))
		}
		if err := d.Write(t.Context(), int64(from*grain), part); err != nil {
			rt.Fatal(err)
		}
	}
	p, err := w.Commit(t.Context(), testPoint("disk0"))
	if err != nil {
		rt.Fatal(err)
	}
	// Changed counts what differs in the end.
	var changed int64
	for g := range grains {
		now, was := cut(image, g, grain), cut(before, g, grain)
		if !bytes.Equal(pad(now, grain), pad(was, grain)) {
			changed += int64(len(now))
		}
	}
	if got := p.Disks[0].Stats.Changed; got != changed {
		rt.Fatalf("Stats.Changed = %d, want %d", got, changed)
	}
	return p
}

// cut returns grain g of image, or what there is of it.
func cut(image []byte, g, grain int) []byte {
	lo := min(g*grain, len(image))
	return image[lo:min(lo+grain, len(image))]
}

func pad(p []byte, n int) []byte { return append(slices.Clone(p), make([]byte, n-len(p))...) }

func checkImage(rt *rapid.T, t *testing.T, r *Repo, p *Point, image []byte, grain int) {
	got, err := r.Point(t.Context(), p.Name())
	if err != nil {
		rt.Fatal(err)
	}
	disk, err := readDisk(t.Context(), r, got.Disks[0].Root)
	if err != nil {
		rt.Fatal(err)
	}
	if !bytes.Equal(disk, image) {
		rt.Fatalf("%s differs at byte %d", p.Name(), firstDiff(disk, image))
	}
	rep, err := r.Verify(t.Context(), got, true, nil)
	if err != nil || !rep.OK() {
		rt.Fatalf("verify: %v, %+v", err, rep.Problems)
	}

	m, err := r.Map(got.Disks[0].Root)
	if err != nil {
		rt.Fatal(err)
	}
	from := rapid.Int64Range(-1, m.Grains()).Draw(rt, "runs from")
	to := rapid.Int64Range(-1, m.Grains()+1).Draw(rt, "runs to")
	at, last := max(from, 0), Run{}
	for run, err := range m.Runs(t.Context(), from, to) {
		if err != nil {
			rt.Fatal(err)
		}
		if run.From != at || run.To <= run.From || last.To > 0 && run.Zero == last.Zero {
			rt.Fatalf("run %+v after %+v, want it at %d", run, last, at)
		}
		for g := run.From; g < run.To; g++ {
			if zero := allZero(cut(image, int(g), grain)); zero != run.Zero {
				rt.Fatalf("grain %d is in %+v", g, run)
			}
		}
		at, last = run.To, run
	}
	if want := max(max(from, 0), min(to, m.Grains())); at != want {
		rt.Fatalf("Runs(%d, %d) ends at %d, want %d", from, to, at, want)
	}
}

func allZero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

func checkDiff(rt *rapid.T, t *testing.T, r *Repo, p, old *Point, now, was []byte, grain int, from, to int64) {
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		rt.Fatal(err)
	}
	o, err := r.Map(old.Disks[0].Root)
	if err != nil {
		rt.Fatal(err)
	}
	differs := map[int64]bool{}
	at := int64(0)
	for run, err := range m.Diff(t.Context(), o, from, to) {
		if err != nil {
			rt.Fatal(err)
		}
		if run.From < max(at, from) || run.To <= run.From || run.To > min(m.Grains(), to) {
			rt.Fatalf("diff run %+v after %d", run, at)
		}
		at = run.To
		for g := run.From; g < run.To; g++ {
			differs[g] = true
			if allZero(cut(now, int(g), grain)) != run.Zero {
				rt.Fatalf("grain %d is in %+v", g, run)
			}
		}
	}
	for g := max(from, 0); g < min(m.Grains(), to); g++ {
		want := !bytes.Equal(pad(cut(now, int(g), grain), grain), pad(cut(was, int(g), grain), grain))
		if differs[g] != want {
			rt.Fatalf("diff of grain %d: %v, want %v", g, differs[g], want)
		}
	}
}
