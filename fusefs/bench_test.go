package fusefs_test

import (
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/fusefs"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

const benchSize = 128 << 20

func benchFile(b *testing.B, cache int64) *os.File {
	b.Helper()
	repo, _ := disktest.Repo(b)
	disktest.Publish(b, repo, disktest.Spec{VM: "vm", Time: evening, Disks: [][]byte{disktest.Content(benchSize, 1)}})
	dir := b.TempDir()
	s, err := fusefs.Mount(b.Context(), dir, restore.NewCatalog(repo, restore.NewCache(cache)), fusefs.Options{})
	if err != nil {
		b.Skipf("SKIPPED: %v", err)
	}
	b.Cleanup(s.Wait)
	f, err := os.Open(dir + "/vm/latest/disk0.raw")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = f.Close() })
	return f
}

// forget drops what the kernel keeps of f.
func forget(b *testing.B, f *os.File) {
	b.Helper()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkSequentialRead reads a disk from end to end, past the kernel's cache and ours.
func BenchmarkSequentialRead(b *testing.B) {
	f := benchFile(b, 8<<20)
	b.SetBytes(benchSize)
	p := make([]byte, 1<<20)
	for b.Loop() {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			b.Fatal(err)
		}
		if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, p); n != benchSize || err != nil {
			b.Fatal(n, err)
		}
		forget(b, f)
	}
}

// BenchmarkRandomRead reads 4 KiB at random places that our cache holds and the kernel's does not.
func BenchmarkRandomRead(b *testing.B) {
	f := benchFile(b, 2*benchSize)
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 4096)
	for i := 0; b.Loop(); i++ {
		if i%4096 == 0 {
			forget(b, f)
		}
		if _, err := f.ReadAt(p, rand.Int64N(benchSize/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}
