package disktest

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store"
)

// Repo makes an empty repository in a directory of the test's, to be closed
// with the test. It returns the directory too.
func Repo(t testing.TB) (repo *store.Repo, dir string) {
	t.Helper()
	dir = t.TempDir() + "/repo"
	repo, err := store.Init(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := repo.Close(); err != nil {
			t.Errorf("close repository: %v", err)
		}
	})
	return repo, dir
}

// Spec describes a point to be made by [Publish].
type Spec struct {
	VM     string
	Time   time.Time
	Grain  int      // bytes; 0 means store.DefaultGrain
	Disks  [][]byte // content of disk0, disk1, ...
	Config []byte

	Consistency store.Consistency // empty means store.Crash
}

// Publish makes a point.
func Publish(t testing.TB, repo *store.Repo, s Spec) *store.Point {
	t.Helper()
	ctx := t.Context()
	w, err := repo.Begin(ctx, s.VM)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Abort(); err != nil {
			t.Errorf("abort: %v", err)
		}
	}()
	grain := s.Grain
	if grain == 0 {
		grain = store.DefaultGrain
	}
	p := store.Point{VM: s.VM, Time: s.Time, Consistency: cmp.Or(s.Consistency, store.Crash), Config: s.Config, Tool: "disktest"}
	for i, content := range s.Disks {
		name := fmt.Sprintf("disk%d", i)
		d, err := w.Disk(ctx, store.DiskOptions{Name: name, Source: "/dev/" + name, Size: int64(len(content)), Grain: grain})
		if err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(content); off += grain {
			if err := d.Write(ctx, int64(off), content[off:min(off+grain, len(content))]); err != nil {
				t.Fatal(err)
			}
		}
		p.Disks = append(p.Disks, store.Disk{Name: name, Source: "/dev/" + name})
	}
	done, err := w.Commit(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

// Damage flips a bit of the one place in the files below dir where the bytes of at
// lie. Content made by [Noise] lies in a repository as it is.
func Damage(t testing.TB, dir string, at []byte) {
	t.Helper()
	hits := 0
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		i := bytes.Index(p, at)
		if i < 0 {
			return nil
		}
		hits++
		p[i+len(at)/2] ^= 1
		return os.WriteFile(path, p, 0o600)
	})
	if err != nil || hits != 1 {
		t.Fatalf("bytes to be damaged were found in %d files, %v", hits, err)
	}
}
