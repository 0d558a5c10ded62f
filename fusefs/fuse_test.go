package fusefs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/fusefs"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
)

var evening = time.Date(2026, 11, 22, 18, 30, 0, 0, time.UTC)

const (
	eveningName = "2026-11-22T18-30-00Z"
	hourLater   = "2026-11-22T19-30-00Z"
)

// refresh is short, so that tests need not wait long.
const refresh = 20 * time.Millisecond

func needFUSE(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("SKIPPED: this machine has no FUSE: %v", err)
	}
}

// mount shows repo at a new directory until the test ends.
func mount(t *testing.T, repo *store.Repo, o fusefs.Options) string {
	t.Helper()
	o.Refresh = refresh
	dir, _ := serve(t, repo, o)
	return dir
}

// serve is mount with the options as they are, and what serves the directory.
func serve(t *testing.T, repo *store.Repo, o fusefs.Options) (string, *fusefs.Server) {
	t.Helper()
	needFUSE(t)
	dir := t.TempDir()
	s, err := fusefs.Mount(t.Context(), dir, restore.NewCatalog(repo, restore.NewCache(16<<20)), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
		s.Wait()
	})
	return dir, s
}

func publish(t *testing.T, repo *store.Repo, vm string, at time.Time, content []byte) *store.Point {
	t.Helper()
	return disktest.Publish(t, repo, disktest.Spec{VM: vm, Time: at, Disks: [][]byte{content}})
}

func fileHash(t *testing.T, path string) [32]byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it did not happen: %s", what)
		}
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var n []string
	for _, e := range entries {
		n = append(n, e.Name())
	}
	return n
}

func TestTreeShowsEveryDiskOfEveryPoint(t *testing.T) {
	repo, _ := disktest.Repo(t)
	want := map[string][]byte{}
	for v, vm := range []string{"db", "web.example"} {
		for p := range 3 {
			disks := [][]byte{disktest.Content(5<<20+512, uint64(v+p+1)), disktest.Content(1<<20, uint64(v+10))}
			at := evening.Add(time.Duration(p) * time.Hour)
			disktest.Publish(t, repo, disktest.Spec{VM: vm, Time: at, Disks: disks})
			for i, content := range disks {
				want[fmt.Sprintf("%s/%s/disk%d.raw", vm, at.Format("2006-01-02T15-04-05Z"), i)] = content
			}
		}
	}
	dir := mount(t, repo, fusefs.Options{})
	if got := names(t, dir); !slices.Equal(got, []string{"db", "web.example"}) {
		t.Errorf("the root holds %v", got)
	}
	if got := names(t, dir+"/db"); !slices.Equal(got, []string{eveningName, hourLater, "2026-11-22T20-30-00Z", "latest"}) {
		t.Errorf("a VM holds %v", got)
	}
	for path, content := range want {
		if fileHash(t, filepath.Join(dir, path)) != sha256.Sum256(content) {
			t.Errorf("%s has other content", path)
		}
		// Once more, now that the kernel has it.
		if fileHash(t, filepath.Join(dir, path)) != sha256.Sum256(content) {
			t.Errorf("%s has other content the second time", path)
		}
	}
}

func TestAttributes(t *testing.T) {
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, disktest.Content(3<<20+512, 1))
	dir := mount(t, repo, fusefs.Options{})
	for path, mode := range map[string]os.FileMode{
		"":                                  os.ModeDir | 0o555,
		"vm":                                os.ModeDir | 0o555,
		"vm/" + eveningName:                 os.ModeDir | 0o555,
		"vm/" + eveningName + "/disk0.raw":  0o444,
		"vm/" + eveningName + "/point.json": 0o444,
	} {
		st, err := os.Stat(filepath.Join(dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != mode {
			t.Errorf("%s has mode %v, want %v", path, st.Mode(), mode)
		}
		if path != "" && !st.ModTime().Equal(evening) {
			t.Errorf("%s has time %v", path, st.ModTime())
		}
		if strings.HasSuffix(path, ".raw") && st.Size() != 3<<20+512 {
			t.Errorf("%s has %d bytes", path, st.Size())
		}
		if st.Sys().(*syscall.Stat_t).Uid != uint32(os.Getuid()) {
			t.Errorf("%s has another owner", path)
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir+"/vm/"+eveningName, &fs); err != nil || fs.Bsize != 4096 || fs.Bfree != 0 || fs.Flags&unix.ST_RDONLY == 0 {
		t.Errorf("statfs: %+v, %v", fs, err)
	}
}

func TestDocuments(t *testing.T) {
	repo, _ := disktest.Repo(t)
	with := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: evening, Disks: [][]byte{make([]byte, 4096)}, Config: []byte(`{"cpus":4}`)})
	publish(t, repo, "vm", evening.Add(time.Hour), make([]byte, 4096))
	dir := mount(t, repo, fusefs.Options{})
	if got := names(t, dir+"/vm/"+eveningName); !slices.Equal(got, []string{"changes-since-previous.json", "disk0.parts", "disk0.raw", "point.json", "vm.json"}) {
		t.Errorf("a point with a configuration holds %v", got)
	}
	if got := names(t, dir+"/vm/"+hourLater); !slices.Equal(got, []string{"changes-since-previous.json", "disk0.parts", "disk0.raw", "point.json"}) {
		t.Errorf("a point without one holds %v", got)
	}
	if got, err := os.ReadFile(dir + "/vm/" + eveningName + "/vm.json"); err != nil || string(got) != `{"cpus":4}` {
		t.Errorf("vm.json is %q, %v", got, err)
	}
	doc, err := os.ReadFile(dir + "/vm/" + eveningName + "/point.json")
	if err != nil {
		t.Fatal(err)
	}
	var p store.Point
	if err := json.Unmarshal(doc, &p); err != nil || p.ID != with.ID || !p.Time.Equal(evening) {
		t.Errorf("point.json is %s, %v", doc, err)
	}
}

func TestNothingCanBeWritten(t *testing.T) {
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, make([]byte, 1<<20))
	dir := mount(t, repo, fusefs.Options{})
	disk := dir + "/vm/" + eveningName + "/disk0.raw"
	open := func(path string, flags int) error {
		f, err := os.OpenFile(path, flags, 0o600)
		if err == nil {
			_ = f.Close()
		}
		return err
	}
	for what, err := range map[string]error{
		"open for writing": open(disk, os.O_WRONLY),
		"open for both":    open(disk, os.O_RDWR),
		"create":           open(dir+"/vm/new", os.O_CREATE|os.O_WRONLY),
		"truncate":         os.Truncate(disk, 0),
		"mkdir":            os.Mkdir(dir+"/vm/new", 0o700),
		"remove":           os.Remove(disk),
		"rename":           os.Rename(disk, disk+"x"),
		"chmod":            os.Chmod(disk, 0o777),
		"symlink":          os.Symlink("x", dir+"/vm/new"),
	} {
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: %v, want %v", what, err, syscall.EROFS)
		}
	}
}

func TestHoles(t *testing.T) {
	const grain = store.DefaultGrain
	content := make([]byte, 64*grain)
	copy(content[4*grain:], disktest.Noise(2*grain, 1))
	copy(content[40*grain:], disktest.Noise(grain, 2))
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, content)
	path := mount(t, repo, fusefs.Options{}) + "/vm/latest/disk0.raw"

	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for _, c := range []struct {
		off, want int64
		whence    int
	}{
		{0, 4 * grain, unix.SEEK_DATA},
		{0, 0, unix.SEEK_HOLE},
		{4 * grain, 4 * grain, unix.SEEK_DATA},
		{4*grain + 7, 4*grain + 7, unix.SEEK_DATA},
		{4 * grain, 6 * grain, unix.SEEK_HOLE},
		{6 * grain, 40 * grain, unix.SEEK_DATA},
		{40 * grain, 41 * grain, unix.SEEK_HOLE},
		{63 * grain, 63 * grain, unix.SEEK_HOLE},
	} {
		if got, err := f.Seek(c.off, c.whence); got != c.want || err != nil {
			t.Errorf("seek(%d, %d): %d, %v, want %d", c.off, c.whence, got, err, c.want)
		}
	}
	for _, c := range [][2]int64{{41 * grain, unix.SEEK_DATA}, {64 * grain, unix.SEEK_HOLE}, {64 * grain, unix.SEEK_DATA}} {
		if _, err := f.Seek(c[0], int(c[1])); !errors.Is(err, syscall.ENXIO) {
			t.Errorf("seek(%d, %d): %v, want %v", c[0], c[1], err, syscall.ENXIO)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Blocks != 3*grain/512 {
		t.Errorf("%d blocks, want %d, %v", st.Blocks, 3*grain/512, err)
	}
}

func TestCopyStaysSparse(t *testing.T) {
	content := make([]byte, 32<<20)
	copy(content[10<<20:], disktest.Noise(1<<20, 1))
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, content)
	dir := mount(t, repo, fusefs.Options{})
	for _, how := range []string{"auto", "always"} {
		to := filepath.Join(t.TempDir(), "copy")
		if out, err := exec.Command("cp", "--sparse="+how, dir+"/vm/latest/disk0.raw", to).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
		if fileHash(t, to) != sha256.Sum256(content) {
			t.Errorf("cp --sparse=%s made another content", how)
		}
		var st unix.Stat_t
		if err := unix.Stat(to, &st); err != nil || st.Blocks*512 > 2<<20 {
			t.Errorf("cp --sparse=%s made a file of %d blocks, %v", how, st.Blocks, err)
		}
	}
}

func TestPointsComeAndGo(t *testing.T) {
	repo, repoDir := disktest.Repo(t)
	publish(t, repo, "vm", evening, disktest.Content(1<<20, 1))
	dir := mount(t, repo, fusefs.Options{})
	if to, err := os.Readlink(dir + "/vm/latest"); err != nil || to != eveningName {
		t.Fatalf("latest leads to %s, %v", to, err)
	}
	content := disktest.Content(1<<20, 2)
	second := publish(t, repo, "vm", evening.Add(time.Hour), content)
	waitFor(t, "the new point is listed", func() bool { return slices.Contains(names(t, dir+"/vm"), hourLater) })
	waitFor(t, "latest leads to it", func() bool {
		to, err := os.Readlink(dir + "/vm/latest")
		return err == nil && to == hourLater
	})
	if fileHash(t, dir+"/vm/latest/disk0.raw") != sha256.Sum256(content) {
		t.Error("the new point has other content")
	}
	publish(t, repo, "another", evening, content)
	waitFor(t, "the new VM is listed", func() bool { return slices.Contains(names(t, dir), "another") })

	removePoint(t, repoDir, second.ID)
	waitFor(t, "the deleted point is gone from the list", func() bool { return !slices.Contains(names(t, dir+"/vm"), hourLater) })
	waitFor(t, "its name is gone", func() bool {
		_, err := os.Stat(dir + "/vm/" + hourLater + "/disk0.raw")
		return errors.Is(err, os.ErrNotExist)
	})
	waitFor(t, "latest leads to the point before", func() bool {
		to, err := os.Readlink(dir + "/vm/latest")
		return err == nil && to == eveningName
	})
}

// removePoint deletes the object of a point from the repository's directory.
func removePoint(t *testing.T, repoDir, id string) {
	t.Helper()
	removed := 0
	err := filepath.WalkDir(repoDir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && strings.Contains(e.Name(), id) {
			removed++
			return os.Remove(path)
		}
		return err
	})
	if err != nil || removed != 1 {
		t.Fatalf("removed %d objects, %v", removed, err)
	}
}

func TestPointsOfOneSecond(t *testing.T) {
	repo, _ := disktest.Repo(t)
	a := publish(t, repo, "vm", evening, disktest.Content(1<<20, 1))
	b := publish(t, repo, "vm", evening.Add(300*time.Millisecond), disktest.Content(1<<20, 2))
	publish(t, repo, "vm", evening.Add(time.Hour), make([]byte, 4096))
	dir := mount(t, repo, fusefs.Options{})
	want := []string{eveningName + "-" + a.ID[:8], eveningName + "-" + b.ID[:8], hourLater, "latest"}
	slices.Sort(want)
	if got := names(t, dir+"/vm"); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for seed, p := range []*store.Point{a, b} {
		if fileHash(t, dir+"/vm/"+eveningName+"-"+p.ID[:8]+"/disk0.raw") != sha256.Sum256(disktest.Content(1<<20, uint64(seed+1))) {
			t.Errorf("point %s has other content", p.ID)
		}
	}
}

func TestUnknownNames(t *testing.T) {
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, make([]byte, 4096))
	dir := mount(t, repo, fusefs.Options{})
	for _, path := range []string{"nobody", "vm/2020-01-01T00-00-00Z", "vm/latest/disk1.raw", "vm/latest/vm.json", "nobody/latest", "no name"} {
		if _, err := os.Stat(filepath.Join(dir, path)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestConcurrentReaders(t *testing.T) {
	content := disktest.Content(8<<20, 1)
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, content)
	path := mount(t, repo, fusefs.Options{}) + "/vm/latest/disk0.raw"
	var wg sync.WaitGroup
	for r := range 8 {
		wg.Go(func() {
			f, err := os.Open(path)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = f.Close() }()
			rnd := rand.New(rand.NewPCG(uint64(r), 1))
			for range 50 {
				off := rnd.IntN(len(content))
				want := content[off:min(len(content), off+1+rnd.IntN(300_000))]
				got := make([]byte, len(want))
				if n, err := f.ReadAt(got, int64(off)); n != len(want) || err != nil || !bytes.Equal(got, want) {
					t.Errorf("read of %d bytes at %d: %d, %v", len(want), off, n, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// direct reads past the page cache, so that each read comes to the server as it is.
func TestDirectReads(t *testing.T) {
	content := disktest.Content(2<<20, 1)
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, content)
	path := mount(t, repo, fusefs.Options{}) + "/vm/latest/disk0.raw"
	out, err := exec.Command("dd", "if="+path, "bs=192k", "iflag=direct", "status=none").Output()
	if err != nil || !bytes.Equal(out, content) {
		t.Errorf("dd with direct reads made %d bytes, %v", len(out), err)
	}
}

func TestDamageFailsOnlyItsGrain(t *testing.T) {
	const grain = store.DefaultGrain
	content := disktest.Noise(64*grain, 1)
	repo, repoDir := disktest.Repo(t)
	publish(t, repo, "vm", evening, content)
	disktest.Damage(t, repoDir, content[20*grain:][:512])
	var mu sync.Mutex
	var told []string
	dir := mount(t, repo, fusefs.Options{Failed: func(path string, err error) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, path)
		if !errors.Is(err, restore.ErrCorrupt) {
			t.Errorf("%s: %v, want %v", path, err, restore.ErrCorrupt)
		}
	}})
	f, err := os.Open(dir + "/vm/latest/disk0.raw")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	// In one sweep with the kernel's read-ahead, then again.
	for range 2 {
		for at := 0; at < len(content); at += 4096 {
			got := make([]byte, 4096)
			_, err := f.ReadAt(got, int64(at))
			if at/grain == 20 {
				if !errors.Is(err, syscall.EIO) {
					t.Fatalf("read at %d in the damaged grain: %v, want %v", at, err, syscall.EIO)
				}
			} else if err != nil || !bytes.Equal(got, content[at:at+4096]) {
				t.Fatalf("read at %d, grain %d: %v", at, at/grain, err)
			}
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(told) == 0 || told[0] != "vm/"+eveningName+"/disk0.raw" {
		t.Errorf("failures were told for %v", told)
	}
}

func TestUnmountOfAMountInUse(t *testing.T) {
	needFUSE(t)
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, disktest.Content(1<<20, 1))
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s, err := fusefs.Mount(ctx, dir, restore.NewCatalog(repo, restore.NewCache(1<<20)), fusefs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(dir + "/vm/latest/disk0.raw")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := s.Unmount(); !errors.Is(err, fusefs.ErrBusy) {
		t.Errorf("unmount: %v, want %v", err, fusefs.ErrBusy)
	}
	if _, err := f.ReadAt(make([]byte, 10), 0); err != nil {
		t.Errorf("read after a failed unmount: %v", err)
	}
	// The end of the context is stronger.
	cancel()
	s.Wait()
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("still mounted: %v", got)
	}
	if _, err := f.ReadAt(make([]byte, 10), 900<<10); err == nil {
		t.Error("a read of what was never read works after the end")
	}
	if err := s.Unmount(); err != nil {
		t.Errorf("unmount after the end: %v", err)
	}
}

func TestUnmountFromOutside(t *testing.T) {
	needFUSE(t)
	repo, _ := disktest.Repo(t)
	dir := t.TempDir()
	s, err := fusefs.Mount(t.Context(), dir, restore.NewCatalog(repo, restore.NewCache(1<<20)), fusefs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
		t.Fatalf("umount: %v: %s", err, out)
	}
	s.Wait()
}

func TestMountRefusals(t *testing.T) {
	needFUSE(t)
	repo, _ := disktest.Repo(t)
	c := restore.NewCatalog(repo, restore.NewCache(1<<20))
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := fusefs.Mount(t.Context(), file, c, fusefs.Options{}); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("on a file: %v", err)
	}
	if _, err := fusefs.Mount(t.Context(), filepath.Join(dir, "none"), c, fusefs.Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("on nothing: %v", err)
	}
}
