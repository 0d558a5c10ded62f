package fusefs_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/fusefs"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
	"github.com/tidemark/tidemark/store/blob"
)

// countedBlobs counts the requests to a repository.
type countedBlobs struct {
	blob.Store
	lists, reads atomic.Int64
}

func (c *countedBlobs) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	c.lists.Add(1)
	return c.Store.List(ctx, prefix)
}

func (c *countedBlobs) ListDirs(ctx context.Context, prefix string) ([]string, error) {
	c.lists.Add(1)
	return c.Store.ListDirs(ctx, prefix)
}

func (c *countedBlobs) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	c.reads.Add(1)
	return c.Store.ReadAt(ctx, name, p, off)
}

// counted opens the repository in dir so that its requests are counted.
func counted(t *testing.T, dir string) (*store.Repo, *countedBlobs) {
	t.Helper()
	d, err := blob.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := &countedBlobs{Store: d}
	repo, err := store.OpenIn(t.Context(), c, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := repo.Close(); err != nil {
			t.Error(err)
		}
	})
	return repo, c
}

// crowd gives a VM, which has a point, n points that no document is read of.
func crowd(t *testing.T, repoDir, vm string, n int) {
	t.Helper()
	var folder string
	err := filepath.WalkDir(repoDir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.IsDir() && filepath.Base(filepath.Dir(path)) == "points" {
			folder = path
		}
		return err
	})
	if err != nil || !strings.HasSuffix(folder, vm) {
		t.Fatalf("folder of points: %q, %v", folder, err)
	}
	for i := range n {
		at := evening.Add(-time.Duration(n-i) * time.Minute)
		name := fmt.Sprintf("%s-%016x", at.Format("20060102T150405.000000000Z"), i+1)
		if err := os.WriteFile(filepath.Join(folder, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestThousandsOfPoints(t *testing.T) {
	const many = 5000
	first, repoDir := disktest.Repo(t)
	publish(t, first, "vm", evening, make([]byte, 4096))
	crowd(t, repoDir, "vm", many)
	repo, count := counted(t, repoDir)
	dir, _ := serve(t, repo, fusefs.Options{Refresh: time.Minute})
	count.lists.Store(0)
	count.reads.Store(0)
	began := time.Now()
	got := names(t, dir+"/vm")
	t.Logf("%d names in %v", len(got), time.Since(began))
	if len(got) != many+2 || !slices.IsSorted(got) {
		t.Errorf("%d names, sorted: %v", len(got), slices.IsSorted(got))
	}
	began = time.Now()
	out, err := exec.Command("ls", "-l", dir+"/vm").Output()
	t.Logf("ls -l in %v", time.Since(began))
	if n := bytes.Count(out, []byte("\n")); err != nil || n != many+3 {
		t.Errorf("ls -l has %d lines, %v", n, err)
	}
	// Root's folders and the one VM's first point; the VM's points, and its damages.
	if l, r := count.lists.Load(), count.reads.Load(); l > 6 || r > 0 {
		t.Errorf("%d listings and %d reads for all of it", l, r)
	}
}

// A crowd that looks at an old listing makes one request.
func TestRequestsAreBounded(t *testing.T) {
	first, repoDir := disktest.Repo(t)
	publish(t, first, "vm", evening, make([]byte, 4096))
	crowd(t, repoDir, "vm", 300)
	repo, count := counted(t, repoDir)
	dir := mount(t, repo, fusefs.Options{})
	began := time.Now()
	done := make(chan struct{})
	for range 8 {
		go func() {
			defer func() { done <- struct{}{} }()
			for time.Since(began) < 500*time.Millisecond {
				_, _ = os.ReadDir(dir + "/vm")
				_, _ = os.Stat(dir + "/vm/none")
			}
		}()
	}
	for range 8 {
		<-done
	}
	// Two per refresh for each of the two directories, and a second for a slow machine's end.
	took := time.Since(began)
	if l, most := count.lists.Load(), int64(5*(took/refresh+2)); l > most {
		t.Errorf("%d listings in %v, want at most %d", l, took, most)
	}
}

// Nobody looks up the deleted point again; the list alone is read.
func TestKernelForgetsDeletedPoints(t *testing.T) {
	needFUSE(t)
	repo, repoDir := disktest.Repo(t)
	publish(t, repo, "vm", evening, disktest.Content(1<<20, 1))
	second := publish(t, repo, "vm", evening.Add(time.Hour), disktest.Content(1<<20, 2))
	dir, s := serve(t, repo, fusefs.Options{Refresh: refresh})
	fileHash(t, dir+"/vm/"+hourLater+"/disk0.raw")
	if !s.Known("vm", hourLater, "disk0.raw") {
		t.Fatal("the kernel does not know what was read")
	}
	removePoint(t, repoDir, second.ID)
	waitFor(t, "the kernel forgets the deleted point", func() bool {
		names(t, dir+"/vm")
		return !s.Known("vm", hourLater)
	})
	if got := names(t, dir+"/vm"); !slices.Equal(got, []string{eveningName, "latest"}) {
		t.Errorf("left are %v", got)
	}
}

// partitioned makes a disk of 8 MiB with two partitions.
func partitioned(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, disktest.Content(8<<20, 7), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/sbin/sfdisk", "--quiet", "--wipe", "never", path)
	cmd.Stdin = strings.NewReader("label: gpt\nstart=1MiB, size=2MiB, name=boot\nstart=4MiB, size=3MiB\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: sfdisk: %v: %s", err, out)
	}
	disk, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return disk
}

func TestPartitionsAreFiles(t *testing.T) {
	repo, _ := disktest.Repo(t)
	disk := partitioned(t)
	disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: evening, Disks: [][]byte{disk, disktest.Content(1<<20, 1)}})
	dir := mount(t, repo, fusefs.Options{}) + "/vm/latest/"
	if got := names(t, dir+"disk0.parts"); !slices.Equal(got, []string{"p1.raw", "p2.raw", "partitions.json"}) {
		t.Errorf("partitions of the first disk: %v", got)
	}
	for name, want := range map[string][]byte{"p1.raw": disk[1<<20 : 3<<20], "p2.raw": disk[4<<20 : 7<<20]} {
		got, err := os.ReadFile(dir + "disk0.parts/" + name)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	text, err := os.ReadFile(dir + "disk0.parts/partitions.json")
	if err != nil || !strings.Contains(string(text), `"name": "boot"`) || !strings.Contains(string(text), `"offset": 4194304`) {
		t.Errorf("partitions.json is %s, %v", text, err)
	}
	if got := names(t, dir+"disk1.parts"); !slices.Equal(got, []string{"partitions.json"}) {
		t.Errorf("partitions of a disk without a table: %v", got)
	}
}

func TestDamagedPartitionTableIsTold(t *testing.T) {
	repo, _ := disktest.Repo(t)
	disk := partitioned(t)
	disk[512+24] ^= 1
	disk[len(disk)-512+24] ^= 1
	publish(t, repo, "vm", evening, disk)
	var told atomic.Int64
	dir := mount(t, repo, fusefs.Options{Failed: func(string, error) { told.Add(1) }})
	text, err := os.ReadFile(dir + "/vm/latest/disk0.parts/partitions.json")
	if err != nil || !strings.Contains(string(text), `"error": "damaged partition table`) || told.Load() != 1 {
		t.Errorf("partitions.json is %s, %v; told %d times", text, err, told.Load())
	}
}

type changes struct {
	Previous *struct{ ID, Name string }
	Disks    []struct {
		Name          string
		Size, Changed int64
		Extents       []struct {
			Offset, Length int64
			Zero           bool
		}
	}
}

func readChanges(t *testing.T, point string) changes {
	t.Helper()
	text, err := os.ReadFile(point + "/changes-since-previous.json")
	if err != nil {
		t.Fatal(err)
	}
	var c changes
	if err := json.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestChangesSincePrevious(t *testing.T) {
	const grain = store.DefaultGrain
	repo, repoDir := disktest.Repo(t)
	content := make([]byte, 32*grain)
	copy(content, disktest.Noise(10*grain, 1))
	first := publish(t, repo, "vm", evening, content)
	content[3*grain+5] ^= 1
	clear(content[7*grain : 8*grain])
	second := publish(t, repo, "vm", evening.Add(time.Hour), content)
	content[20*grain] = 1
	publish(t, repo, "vm", evening.Add(2*time.Hour), content)
	dir := mount(t, repo, fusefs.Options{}) + "/vm/"
	third := dir + "2026-11-22T20-30-00Z"

	c := readChanges(t, dir+eveningName)
	if c.Previous != nil || fmt.Sprint(c.Disks) != fmt.Sprintf("[{disk0 %d %d [{0 %d false}]}]", 32*grain, 10*grain, 10*grain) {
		t.Errorf("the first point: %+v", c)
	}
	c = readChanges(t, dir+hourLater)
	if c.Previous == nil || c.Previous.ID != first.ID || c.Previous.Name != eveningName ||
		fmt.Sprint(c.Disks) != fmt.Sprintf("[{disk0 %d %d [{%d %d false} {%d %d true}]}]", 32*grain, 2*grain, 3*grain, grain, 7*grain, grain) {
		t.Errorf("the second point: %+v", c)
	}
	c = readChanges(t, third)
	if fmt.Sprint(c.Disks) != fmt.Sprintf("[{disk0 %d %d [{%d %d false}]}]", 32*grain, grain, 20*grain, grain) {
		t.Errorf("the third point: %+v", c)
	}
	// When the second is deleted, the third differs from the first.
	removePoint(t, repoDir, second.ID)
	waitFor(t, "the first is the one before", func() bool { return readChanges(t, third).Previous.ID == first.ID })
	if c = readChanges(t, third); c.Disks[0].Changed != 3*grain {
		t.Errorf("the third point after the second was deleted: %+v", c)
	}
}
