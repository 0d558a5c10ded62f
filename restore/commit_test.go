package restore_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
)

// contentOf reads a disk of a point.
func contentOf(t *testing.T, c *restore.Catalog, name restore.PointInfo, disk int) []byte {
	t.Helper()
	p, err := c.Point(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	d, closer, err := c.Open(t.Context(), p, disk)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = closer.Close() }()
	got := make([]byte, d.Size())
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	return got
}

// What is known to be lost of the base would be lost of a point that nobody knows to be damaged.
func TestLossIsNotCommitted(t *testing.T) {
	repo, dir := disktest.Repo(t)
	model := disktest.Noise(1<<20, 1)
	base := disktest.Publish(t, repo, disktest.Spec{VM: "web", Time: noon, Disks: [][]byte{model}})
	c := restore.NewCatalog(repo, restore.NewCache(8<<20))
	p, err := c.Point(t.Context(), base.Name())
	if err != nil {
		t.Fatal(err)
	}
	disktest.Damage(t, dir, model[300<<10:301<<10])
	if r, err := repo.Repair(t.Context(), []store.PointName{base.Name()}, store.RepairOptions{}); err != nil || !r.Lost() {
		t.Fatalf("repair: %+v, %v", r, err)
	}
	d, closer, err := c.Open(t.Context(), p, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = closer.Close() }()
	o, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "overlay"), d, c.Identity(p, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	if _, err := o.WriteAt(make([]byte, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
	overlays := map[int]*restore.Overlay{0: o}
	if made, err := c.Commit(t.Context(), p, overlays, restore.CommitOptions{}); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("a point with a loss: %+v, %v", made, err)
	}
	// The guest has written all that was lost.
	if _, err := o.WriteAt(model[256<<10:320<<10], 256<<10); err != nil {
		t.Fatal(err)
	}
	clear(model[:64<<10])
	made, err := c.Commit(t.Context(), p, overlays, restore.CommitOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contentOf(t, c, made.Name(), 0), model) {
		t.Error("the point is not base and overlay")
	}
}

func TestCommittedPointIsBaseAndOverlay(t *testing.T) {
	repo, _ := disktest.Repo(t)
	const grain = 64 << 10
	model := disktest.Noise(9<<20+512, 1)
	other := disktest.Noise(1<<20, 2)
	base := disktest.Publish(t, repo, disktest.Spec{VM: "web", Time: noon, Disks: [][]byte{model, other}, Config: []byte(`{"cpus":2}`)})
	newer := disktest.Publish(t, repo, disktest.Spec{VM: "web", Time: noon.Add(1), Disks: [][]byte{disktest.Noise(9<<20+512, 3), other}})
	c := restore.NewCatalog(repo, restore.NewCache(8<<20))
	p, err := c.Point(t.Context(), base.Name())
	if err != nil {
		t.Fatal(err)
	}
	d, closer, err := c.Open(t.Context(), p, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = closer.Close() }()
	path := filepath.Join(t.TempDir(), "overlay")
	o, err := restore.CreateOverlay(path, d, c.Identity(p, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()

	want := bytes.Clone(model)
	touched := map[int]bool{}
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 30 {
		n := 1 + rnd.IntN(9000)
		off := rnd.IntN(len(want) - n)
		if i == 0 { // the short grain at the end
			off, n = len(want)-100, 100
		}
		if i%4 == 3 {
			n, off = 8192, off/4096*4096
			n = min(n, len(want)-off)
			if err := o.Zero(int64(off), int64(n)); err != nil {
				t.Fatal(err)
			}
			clear(want[off : off+n])
		} else {
			b := disktest.Noise(n, uint64(100+i))
			copy(want[off:], b)
			if _, err := o.WriteAt(b, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		// An overlay knows blocks of 4 KiB.
		for g := off / 4096 * 4096 / grain; g*grain < (off+n+4095)/4096*4096; g++ {
			touched[g] = true
		}
	}
	made, err := c.Commit(t.Context(), p, map[int]*restore.Overlay{0: o}, restore.CommitOptions{Tool: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contentOf(t, c, made.Name(), 0), want) {
		t.Error("the point is not base and overlay")
	}
	if !bytes.Equal(contentOf(t, c, made.Name(), 1), other) {
		t.Error("the other disk changed")
	}
	if !bytes.Equal(contentOf(t, c, base.Name(), 0), model) {
		t.Error("the base changed")
	}
	if made.Parent != base.ID || made.Consistency != store.Crash || made.Quiesce.Method != restore.CommittedMode || !made.Time.After(newer.Time) || string(made.Config) != `{"cpus":2}` {
		t.Errorf("point %+v", made)
	}
	s := made.Disks[0]
	if s.Stats.Read > int64(len(touched)*grain) || s.Stats.Changed > s.Stats.Read || s.Stats.Stored > s.Stats.Read+(64<<10) || s.ChangeID != "" {
		t.Errorf("costs %+v for %d grains of %d", s.Stats, len(touched), grain)
	}
	if made.Disks[1].Stats.Read != 0 || made.Disks[1].Stats.Stored != 0 {
		t.Errorf("costs of the other disk %+v", made.Disks[1].Stats)
	}
	latest, err := c.Find(t.Context(), "web")
	if err != nil || latest.ID != made.ID {
		t.Errorf("latest is %+v, %v", latest, err)
	}

	of, err := restore.ReadOverlayBase(path)
	if err != nil || of != (restore.OverlayBase{Repository: c.ID(), VM: "web", Point: base.ID, Disk: 0}) {
		t.Errorf("base of the overlay: %+v, %v", of, err)
	}
	// The overlay is as it was.
	again, err := c.Commit(t.Context(), p, map[int]*restore.Overlay{0: o}, restore.CommitOptions{Tool: "test"})
	if err != nil || !bytes.Equal(contentOf(t, c, again.Name(), 0), want) {
		t.Errorf("again: %+v, %v", again, err)
	}
	// The base is forgotten: what the overlay lies over is gone.
	if _, err := repo.Forget(t.Context(), []store.PointName{base.Name()}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Commit(t.Context(), p, map[int]*restore.Overlay{0: o}, restore.CommitOptions{}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("over a forgotten point: %v", err)
	}
}
