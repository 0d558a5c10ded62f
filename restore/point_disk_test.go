package restore_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func TestPointDiskIsADisk(t *testing.T) {
	for name, grain := range map[string]int{"4 KiB grains": 4 << 10, "64 KiB grains": 64 << 10, "1 MiB grains": 1 << 20} {
		t.Run(name, func(t *testing.T) {
			disktest.Run(t, func(t *testing.T, content []byte) restore.Disk {
				repo, _ := disktest.Repo(t)
				p := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon, Grain: grain, Disks: [][]byte{content}})
				d, err := restore.OpenPoint(repo, p, 0, restore.NewCache(int64(8*grain)))
				if err != nil {
					t.Fatal(err)
				}
				return d
			})
		})
	}
}

// The second point of a VM shares most of its map and grains with the first.
func TestIncrementalPointDiskIsADisk(t *testing.T) {
	disktest.Run(t, func(t *testing.T, content []byte) restore.Disk {
		repo, _ := disktest.Repo(t)
		before := bytes.Clone(content)
		copy(before[len(before)/3:], disktest.Content(len(before)/2, 30))
		cache := restore.NewCache(1 << 20)
		first := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon, Disks: [][]byte{before}})
		second := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon.Add(time.Hour), Disks: [][]byte{content}})
		if got := readPoint(t, repo, first, cache); !bytes.Equal(got, before) {
			t.Error("the first point changed")
		}
		d, err := restore.OpenPoint(repo, second, 0, cache)
		if err != nil {
			t.Fatal(err)
		}
		return d
	})
}

func readPoint(t *testing.T, repo *store.Repo, p *store.Point, cache *restore.Cache) []byte {
	t.Helper()
	d, err := restore.OpenPoint(repo, p, 0, cache)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	got := make([]byte, d.Size())
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	return got
}

// What a standby boots from: writes go to the overlay, all else comes from the point.
func TestOverlayOverAPointIsADisk(t *testing.T) {
	disktest.Run(t, func(t *testing.T, content []byte) restore.Disk {
		before := bytes.Clone(content)
		from, to := len(content)/3, len(content)*2/3
		copy(before[from:to], disktest.Noise(to-from, 33))
		repo, _ := disktest.Repo(t)
		p := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon, Disks: [][]byte{before}})
		d, err := restore.OpenPoint(repo, p, 0, restore.NewCache(1<<20))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = d.Close() })
		o, _ := newOverlay(t, d)
		if _, err := o.WriteAt(content[from:to], int64(from)); err != nil {
			t.Fatal(err)
		}
		return o
	})
}

func TestOpenPointWithoutThatDisk(t *testing.T) {
	repo, _ := disktest.Repo(t)
	p := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon, Disks: [][]byte{make([]byte, 4096)}})
	for _, i := range []int{-1, 1} {
		if _, err := restore.OpenPoint(repo, p, i, restore.NewCache(0)); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("disk %d: %v", i, err)
		}
	}
}

func TestOpenPointOfOddShape(t *testing.T) {
	repo, _ := disktest.Repo(t)
	for _, root := range []store.Root{{Size: 1 << 20}, {Size: 1 << 20, Grain: 5000}, {Size: -1, Grain: 4096}, {Size: 1, Grain: 1 << 30}} {
		p := &store.Point{Disks: []store.Disk{{Name: "disk0", Root: root}}}
		if _, err := restore.OpenPoint(repo, p, 0, restore.NewCache(0)); err == nil {
			t.Errorf("%+v was opened", root)
		}
	}
}

// Damage to a pack must come through as an error on the bytes it hits, and nowhere else.
func TestDamagedPackFailsOnlyItsGrains(t *testing.T) {
	const grain = 64 << 10
	content := disktest.Noise(40*grain, 32) // incompressible: grains lie in the pack one to one
	repo, dir := disktest.Repo(t)
	p := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon, Grain: grain, Disks: [][]byte{content}})
	disktest.Damage(t, dir, content[20*grain:][:512])
	d, err := restore.OpenPoint(repo, p, 0, restore.NewCache(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	for g := range int64(40) {
		got := make([]byte, grain)
		_, err := d.ReadAt(got, g*grain)
		if g != 20 {
			if err != nil || !bytes.Equal(got, content[g*grain:(g+1)*grain]) {
				t.Errorf("grain %d: %v", g, err)
			}
			continue
		}
		var re *restore.ReadError
		if !errors.Is(err, restore.ErrCorrupt) || !errors.As(err, &re) || re.Off != 20*grain || re.Len != grain {
			t.Errorf("damaged grain: %v", err)
		}
	}
}
