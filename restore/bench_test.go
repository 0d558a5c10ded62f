package restore_test

import (
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

const benchSize = 128 << 20

// benchDisk opens a point of half text, half zeroes and noise.
func benchDisk(b *testing.B, cache int64) *restore.PointDisk {
	b.Helper()
	repo, _ := disktest.Repo(b)
	p := disktest.Publish(b, repo, disktest.Spec{VM: "vm", Time: noon, Disks: [][]byte{disktest.Content(benchSize, 50)}})
	d, err := restore.OpenPoint(repo, p, 0, restore.NewCache(cache))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() })
	return d
}

// BenchmarkSequentialRead reads a point from end to end, each grain for the first time.
func BenchmarkSequentialRead(b *testing.B) {
	for name, n := range map[string]int64{"128KiB": 128 << 10, "1MiB": 1 << 20} {
		b.Run(name, func(b *testing.B) {
			d := benchDisk(b, 16<<20)
			p := make([]byte, n)
			b.SetBytes(n)
			at := int64(0)
			for b.Loop() {
				if _, err := d.ReadAt(p, at); err != nil {
					b.Fatal(err)
				}
				at = (at + n) % benchSize
			}
		})
	}
}

// BenchmarkRandomRead reads 4 KiB at random places, all of them cached or few.
func BenchmarkRandomRead(b *testing.B) {
	for name, cache := range map[string]int64{"cached": 2 * benchSize, "cold": 1 << 20} {
		b.Run(name, func(b *testing.B) {
			d := benchDisk(b, cache)
			p := make([]byte, 1<<20)
			for at := int64(0); at < benchSize; at += 1 << 20 {
				if _, err := d.ReadAt(p, at); err != nil {
					b.Fatal(err)
				}
			}
			p = p[:4096]
			b.SetBytes(4096)
			for b.Loop() {
				if _, err := d.ReadAt(p, rand.Int64N(benchSize/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOverlay writes and reads 4 KiB at random places of an overlay.
func BenchmarkOverlay(b *testing.B) {
	o, err := restore.CreateOverlay(filepath.Join(b.TempDir(), "overlay"), emptyDisk(benchSize), identity)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	p := make([]byte, 4096)
	b.Run("write", func(b *testing.B) {
		b.SetBytes(4096)
		for b.Loop() {
			if _, err := o.WriteAt(p, rand.Int64N(benchSize/4096)*4096); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		b.SetBytes(4096)
		for b.Loop() {
			if _, err := o.ReadAt(p, rand.Int64N(benchSize/4096)*4096); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkWriteTo restores a point to a new file, and to one that holds it already.
func BenchmarkWriteTo(b *testing.B) {
	for name, inPlace := range map[string]bool{"new": false, "same": true} {
		b.Run(name, func(b *testing.B) {
			d := benchDisk(b, 1<<20)
			path := filepath.Join(b.TempDir(), "disk.raw")
			if _, err := restore.WriteTo(b.Context(), d, path, restore.WriteOptions{}); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(benchSize)
			for b.Loop() {
				if _, err := restore.WriteTo(b.Context(), d, path, restore.WriteOptions{Force: !inPlace, InPlace: inPlace}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
