package store

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// benchContent looks like a disk: half random, half text, no two grains equal.
func benchContent(n int) []byte {
	p := noise(1, n)
	for g := 0; g+k64 <= n; g += k64 {
		copy(p[g+k64/2:g+k64], text(uint64(g), k64/2))
	}
	return p
}

func BenchmarkWrite(b *testing.B) {
	content := map[string]func(n int) []byte{
		"half": benchContent,
		"raw":  func(n int) []byte { return noise(2, n) },
		"zero": func(n int) []byte { return make([]byte, n) },
	}
	for _, kind := range []string{"half", "raw", "zero"} {
		b.Run(kind, func(b *testing.B) {
			r, err := testInit(b.Context(), b.TempDir())
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = r.Close() }()
			w, err := r.Begin(b.Context(), "a")
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = w.Abort() }()
			d, err := w.Disk(b.Context(), DiskOptions{Name: "disk0", Size: 1 << 50})
			if err != nil {
				b.Fatal(err)
			}
			p := content[kind](1 << 20)
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			n := uint64(0)
			for b.Loop() {
				n++
				if kind != "zero" {
					for g := 0; g < len(p); g += k64 {
						binary.LittleEndian.PutUint64(p[g:], n<<8|uint64(g/k64))
					}
				}
				if err := d.Write(b.Context(), int64(n)<<20, p); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			if _, err := w.Commit(b.Context(), testPoint("disk0")); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkCompare writes a disk that did not change.
func BenchmarkCompare(b *testing.B) {
	r := testRepo(b)
	r.dataPackLen, r.nodePackLen = dataPackLen, nodePackLen
	image := noise(1, 64<<20)
	backup(b, r, DiskOptions{Size: 64 << 20}, write{0, image})
	b.SetBytes(64 << 20)
	for b.Loop() {
		if p := backup(b, r, DiskOptions{Size: 64 << 20}, write{0, image}); p.Disks[0].Stats.Stored != 0 {
			b.Fatalf("%+v", p.Disks[0].Stats)
		}
	}
}

// BenchmarkPoint makes incrementals of ten changed grains: the cost of a commit.
func BenchmarkPoint(b *testing.B) {
	r := testRepo(b)
	r.dataPackLen, r.nodePackLen = dataPackLen, nodePackLen
	backup(b, r, DiskOptions{Size: 1 << 40}, write{0, noise(1, 64<<20)})
	n, stored := uint64(0), int64(0)
	for b.Loop() {
		ws := make([]write, 0, 10)
		for i := range int64(10) {
			n++
			ws = append(ws, write{i * 1000 * k64, noise(n, k64)})
		}
		stored = backup(b, r, DiskOptions{Size: 1 << 40}, ws...).Disks[0].Stats.Stored
	}
	b.ReportMetric(float64(stored-10*k64), "overheadB/point")
}

func BenchmarkReadGrain(b *testing.B) {
	for _, kind := range []string{"half", "raw"} {
		b.Run(kind, func(b *testing.B) {
			r := testRepo(b)
			r.dataPackLen, r.nodePackLen = dataPackLen, nodePackLen
			image := benchContent(256 << 20)
			if kind == "raw" {
				image = noise(1, 256<<20)
			}
			p := backup(b, r, DiskOptions{Size: 256 << 20}, write{0, image})
			m, err := r.Map(p.Disks[0].Root)
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(k64)
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				rnd := rand.New(rand.NewPCG(1, rand.Uint64()))
				dst := make([]byte, k64)
				for pb.Next() {
					ref, err := m.Lookup(b.Context(), rnd.Int64N(m.Grains()))
					if err != nil {
						b.Fatal(err)
					}
					if err := r.ReadGrain(b.Context(), ref, dst); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
