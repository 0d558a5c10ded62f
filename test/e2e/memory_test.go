package e2e

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// A first backup's memory does not grow with the disk: 256 GiB, nearly all of it a hole, and enough data that
// every buffer is in use.
func TestMemoryOfAFullBackupIsBounded(t *testing.T) {
	testvm.RequireRoot(t)
	const size, data, limit = 256 << 30, 384 << 20, 256 << 20
	h := &host{t: t, repo: filepath.Join(t.TempDir(), "repo"), pins: "/sys/fs/bpf/tidemark-e2e-memory"}
	file := filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	rnd := rand.NewChaCha8([32]byte{1})
	p := make([]byte, 1<<20)
	for i := range int64(data >> 20) {
		_, _ = rnd.Read(p)
		if _, err := f.WriteAt(p, i<<29); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	h.run("init")
	t.Cleanup(func() { _ = h.command("untrack", "--all").Run() })
	c := h.command("backup", "vm", "--disk", file, "--quiesce", "none", "--json")
	begin := time.Now()
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var r struct {
		Point struct {
			Disks []struct {
				Stats struct {
					Read int64 `json:"read"`
					New  int64 `json:"new"`
				} `json:"stats"`
			} `json:"disks"`
		} `json:"point"`
	}
	if err := json.Unmarshal(out, &r); err != nil || len(r.Point.Disks) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	most := c.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
	s := r.Point.Disks[0].Stats
	t.Logf("%d MiB of memory at most, %v, read %d MiB", most>>20, time.Since(begin), s.Read>>20)
	if most > limit {
		t.Errorf("it took %d MiB of memory, more than %d", most>>20, limit>>20)
	}
	if s.New != data || s.Read > 2*data {
		t.Errorf("read %d MiB, stored %d MiB", s.Read>>20, s.New>>20)
	}
}
