package restore_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
)

const diffGrain = 4 << 10

// publishDisk makes a point of one disk and opens it.
func publishDisk(t *testing.T, repo *store.Repo, vm string, at time.Duration, grain int, content []byte) *restore.PointDisk {
	t.Helper()
	p := disktest.Publish(t, repo, disktest.Spec{VM: vm, Time: noon.Add(at), Grain: grain, Disks: [][]byte{content}})
	d, err := restore.OpenPoint(repo, p, 0, restore.NewCache(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// checkDiff applies what d says to differ from old to old's content, by d's
// content, and expects the disk's own. It returns how many bytes that were.
func checkDiff(t *testing.T, d restore.Disk, now []byte, old restore.Disk, was []byte, off, n int64) int64 {
	t.Helper()
	got := make([]byte, len(now))
	copy(got, was) // cut, or followed by zeroes
	end := min(off+n, int64(len(now)))
	at, total := off, int64(0)
	for c, err := range d.(restore.Differ).Diff(t.Context(), old, off, n) {
		if err != nil {
			t.Fatal(err)
		}
		if c.Off < at || c.Len <= 0 || c.Off+c.Len > end {
			t.Fatalf("%+v after %d of [%d, %d)", c, at, off, end)
		}
		at = c.Off + c.Len
		total += c.Len
		copy(got[c.Off:at], now[c.Off:at])
		if c.Zero && !bytes.Equal(now[c.Off:at], make([]byte, c.Len)) {
			t.Fatalf("%+v is not zero", c)
		}
	}
	if off < end && !bytes.Equal(got[off:end], now[off:end]) {
		t.Fatalf("a difference in [%d, %d) was not told", off, end)
	}
	return total
}

func TestDiffLeadsFromOnePointToAnother(t *testing.T) {
	repo, _ := disktest.Repo(t)
	rng := rand.New(rand.NewPCG(5, 6))
	images := [][]byte{disktest.Content(3<<20+700, 50)}
	for range 5 {
		next := bytes.Clone(images[len(images)-1])
		if rng.IntN(2) == 0 { // grows or shrinks
			next = append(next[:len(next)-rng.IntN(1<<20)], make([]byte, rng.IntN(1<<20))...)
		}
		for range rng.IntN(40) {
			from := rng.IntN(len(next))
			part := next[from:min(len(next), from+rng.IntN(30000))]
			if rng.IntN(3) == 0 {
				clear(part)
			} else {
				copy(part, disktest.Content(len(part)+1, rng.Uint64()))
			}
		}
		images = append(images, next)
	}
	disks := make([]*restore.PointDisk, len(images))
	for i, image := range images {
		disks[i] = publishDisk(t, repo, "vm", time.Duration(i)*time.Hour, diffGrain, image)
	}
	for i, d := range disks {
		ov, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "o"), d, "x")
		if err != nil {
			t.Fatal(err)
		}
		written := bytes.Clone(images[i])
		copy(written[100_000:], "over")
		clear(written[300_000:340_000])
		if _, err := ov.WriteAt([]byte("over"), 100_000); err != nil {
			t.Fatal(err)
		}
		if err := ov.Zero(300_000, 40_000); err != nil {
			t.Fatal(err)
		}
		for k, old := range disks {
			checkDiff(t, d, images[i], old, images[k], 0, 1<<40)
			checkDiff(t, ov, written, old, images[k], 0, 1<<40)
			for range 20 {
				off, n := rng.Int64N(4<<20), rng.Int64N(1<<20)
				checkDiff(t, d, images[i], old, images[k], off, n)
				checkDiff(t, ov, written, old, images[k], off, n)
			}
		}
		if n := checkDiff(t, d, images[i], d, images[i], 0, 1<<40); n != 0 {
			t.Errorf("a disk differs from itself in %d bytes", n)
		}
		// 100000 is in one block, 300000 to 340000 in 11.
		if n := checkDiff(t, ov, written, d, images[i], 0, 1<<40); n != 12*4096 {
			t.Errorf("the overlay differs from its base in %d bytes", n)
		}
		if err := ov.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDiffOfOtherGrainsIsAllData(t *testing.T) {
	repo, _ := disktest.Repo(t)
	was := make([]byte, 1<<20)
	copy(was[500_000:], disktest.Content(100_000, 51))
	now := make([]byte, 1<<20+9)
	copy(now[100_000:], disktest.Content(10_000, 52))
	old := publishDisk(t, repo, "vm", 0, 4<<10, was)
	d := publishDisk(t, repo, "vm2", 0, 64<<10, now)
	if n := checkDiff(t, d, now, old, was, 0, 1<<40); n > 300_000 {
		t.Errorf("%d bytes", n)
	}
	checkDiff(t, old, was, d, now, 99_999, 600_001)
}

func TestDiffRefusesWhatItCannotCompare(t *testing.T) {
	repo, _ := disktest.Repo(t)
	other, _ := disktest.Repo(t)
	image := disktest.Content(1<<20, 53)
	d := publishDisk(t, repo, "vm", 0, diffGrain, image)
	foreign := publishDisk(t, other, "vm", 0, diffGrain, image)
	ov, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "o"), d, "x")
	if err != nil {
		t.Fatal(err)
	}
	odd, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "o"), disktest.Bytes(image), "x")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		d   restore.Differ
		old restore.Disk
	}{
		"another repository":   {d, foreign},
		"bytes":                {d, disktest.Bytes(image)},
		"an overlay":           {d, ov},
		"overlay of something": {odd, d},
		"overlay, foreign":     {ov, foreign},
	} {
		n := 0
		for _, err := range c.d.Diff(t.Context(), c.old, 0, 1<<20) {
			if n++; !errors.Is(err, restore.ErrIncomparable) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if n != 1 {
			t.Errorf("%s: %d results", name, n)
		}
	}
	for _, err := range d.Diff(t.Context(), d, -1, 1) {
		if !errors.Is(err, restore.ErrRange) {
			t.Errorf("negative offset: %v", err)
		}
	}
	if err := errors.Join(ov.Close(), odd.Close()); err != nil {
		t.Error(err)
	}
}

func TestLayersSayWhereBytesComeFrom(t *testing.T) {
	repo, _ := disktest.Repo(t)
	image := make([]byte, 64<<10)
	copy(image[8192:], bytes.Repeat([]byte{7}, 8192))
	d := publishDisk(t, repo, "vm", 0, diffGrain, image)
	lower, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "o"), d, "x")
	if err != nil {
		t.Fatal(err)
	}
	upper, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "o"), lower, "y")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lower.WriteAt([]byte("x"), 12288); err != nil {
		t.Fatal(err)
	}
	if err := upper.Zero(4096, 4096); err != nil {
		t.Fatal(err)
	}
	layers := func(d restore.Disk, off, n int64) (list []restore.Layer) {
		for l, err := range restore.Layers(t.Context(), d, off, n) {
			if err != nil {
				t.Fatal(err)
			}
			if k := len(list) - 1; k >= 0 && list[k].Depth == l.Depth && list[k].Off+list[k].Len == l.Off {
				list[k].Len += l.Len
				continue
			}
			list = append(list, l)
		}
		return list
	}
	for name, c := range map[string]struct {
		got, want []restore.Layer
	}{
		"point":      {layers(d, 0, 1<<20), []restore.Layer{{0, 8192, 0}, {8192, 8192, 1}, {16384, 49152, 0}}},
		"overlay":    {layers(lower, 0, 1<<20), []restore.Layer{{0, 8192, 0}, {8192, 4096, 2}, {12288, 4096, 1}, {16384, 49152, 0}}},
		"two":        {layers(upper, 0, 1<<20), []restore.Layer{{0, 4096, 0}, {4096, 4096, 1}, {8192, 4096, 3}, {12288, 4096, 2}, {16384, 49152, 0}}},
		"a part":     {layers(upper, 4097, 4096), []restore.Layer{{4097, 4095, 1}, {8192, 1, 3}}},
		"behind end": {layers(upper, 64<<10, 10), nil},
	} {
		if len(c.got) != len(c.want) {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
			continue
		}
		for i := range c.got {
			if c.got[i] != c.want[i] {
				t.Errorf("%s: %v, want %v", name, c.got, c.want)
				break
			}
		}
	}
	if err := errors.Join(upper.Close(), lower.Close()); err != nil {
		t.Error(err)
	}
}
