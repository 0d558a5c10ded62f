package appliance_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/fusefs"
	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/guestfs/appliance"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// entry is what is compared of a file.
type entry struct {
	mode       uint32
	uid, gid   uint32
	nlink      uint32
	rdev       uint64
	size       int64
	mtime      int64 // nanoseconds
	link, hash string
	xattrs     string
	twin       string // first path of the same file
}

// survey walks a tree.
func survey(t *testing.T, root string) map[string]entry {
	t.Helper()
	found := map[string]entry{}
	twins := map[[2]uint64]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if rel == "lost+found" || strings.HasPrefix(rel, "System Volume Information") {
			return nil
		}
		e := entry{mode: st.Mode, uid: st.Uid, gid: st.Gid, nlink: uint32(st.Nlink), rdev: st.Rdev, mtime: st.Mtim.Nano()}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			e.size = st.Size
			h := sha256.New()
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			_, err = io.Copy(h, f)
			if err := errors.Join(err, f.Close()); err != nil {
				return err
			}
			e.hash = fmt.Sprintf("%x", h.Sum(nil)[:8])
			if first := twins[[2]uint64{st.Dev, st.Ino}]; first != "" {
				e.twin = first
			} else {
				twins[[2]uint64{st.Dev, st.Ino}] = rel
			}
		case unix.S_IFLNK:
			if e.link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		names := make([]byte, 64<<10)
		n, err := unix.Llistxattr(path, names)
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("listxattr %q: %w", path, err)
		}
		var all []string
		for name := range strings.SplitSeq(string(names[:max(n, 0)]), "\x00") {
			value := make([]byte, 64<<10)
			if name == "" {
				continue
			}
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return fmt.Errorf("getxattr %q %s: %w", path, name, err)
			}
			all = append(all, fmt.Sprintf("%s=%x", name, value[:n]))
		}
		slices.Sort(all)
		e.xattrs = strings.Join(all, " ")
		found[rel] = e
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// differ compares two surveys, after plain has taken out what a kind of file system has not.
func differ(t *testing.T, name string, want, got map[string]entry, plain func(entry) entry) {
	t.Helper()
	wrong, xattrs := 0, 0
	for path, w := range want {
		g, ok := got[path]
		w, g = plain(w), plain(g)
		if w.xattrs != "" {
			xattrs++
		}
		if !ok || w != g {
			if wrong++; wrong <= 5 {
				t.Errorf("%s: %q is %+v (there: %v), want %+v", name, path, g, ok, w)
			}
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			if wrong++; wrong <= 5 {
				t.Errorf("%s: %q was not in the original", name, path)
			}
		}
	}
	t.Logf("TABLE %-6s %6d entries, %d with xattrs, %d differ", name, len(want), xattrs, wrong)
}

func all(e entry) entry { return e }

// names that are hard to pass on.
var oddNames = []string{"with space", "new\nline", "\xff\xfe not utf-8", "-rf", "ü", strings.Repeat("n", 255), "back\\slash", "star*"}

// fillTree makes n files and some of each kind below dir.
func fillTree(t *testing.T, dir string, n int, kind string) {
	t.Helper()
	posix := kind != "vfat" && kind != "ntfs"
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		d := filepath.Join(dir, fmt.Sprintf("dir%d", i%7), fmt.Sprint(i%11))
		if i%3 == 0 {
			d = filepath.Join(dir, "many") // a big directory
		}
		must(os.MkdirAll(d, 0o755))
		p := filepath.Join(d, fmt.Sprintf("file %d.txt", i))
		must(os.WriteFile(p, bytes.Repeat(fmt.Appendf(nil, "%s %d\n", kind, i), i%400), 0o600|os.FileMode(i%64)))
		if posix {
			must(os.Lchown(p, i%1000, 70000+i%7))
			must(os.Chmod(p, fs.FileMode(i%512)))
			if i%5 == 0 {
				must(unix.Lsetxattr(p, "user.number", fmt.Append(nil, i), 0))
			}
		}
		at := time.Unix(1000000000+int64(i)*86, int64(i)*1234567%1e9)
		if kind == "vfat" {
			at = at.Truncate(2 * time.Second)
		}
		must(os.Chtimes(p, at, at))
	}
	must(os.WriteFile(filepath.Join(dir, "large"), disktest.Content(5<<20+17, 3), 0o644))
	if !posix {
		at := time.Unix(1234567890, 0)
		must(os.WriteFile(filepath.Join(dir, "ünï long name.txt"), []byte("x"), 0o644))
		must(os.Chtimes(filepath.Join(dir, "ünï long name.txt"), at, at))
		must(os.Chtimes(filepath.Join(dir, "large"), at, at))
		return
	}
	odd := filepath.Join(dir, "odd")
	must(os.Mkdir(odd, 0o1777))
	for i, name := range oddNames {
		must(os.WriteFile(filepath.Join(odd, name), []byte(name), 0o644))
		must(os.Symlink(name+"/../x", filepath.Join(odd, fmt.Sprint("link", i))))
	}
	must(os.Link(filepath.Join(dir, "large"), filepath.Join(odd, "twin")))
	must(unix.Mkfifo(filepath.Join(odd, "fifo"), 0o620))
	must(unix.Mknod(filepath.Join(odd, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Mknod(filepath.Join(odd, "block"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 300))))
	must(os.WriteFile(filepath.Join(odd, "suid"), []byte("s"), 0o755))
	must(unix.Chmod(filepath.Join(odd, "suid"), 0o6755))
	run(t, "setfacl", "-m", "u:1234:rw,g:77:r", filepath.Join(odd, "suid"))
	run(t, "setfacl", "-d", "-m", "u:1234:rwx", odd)
	must(unix.Lsetxattr(filepath.Join(odd, "suid"), "trusted.secret", bytes.Repeat([]byte{7}, 200), 0))
	must(unix.Lsetxattr(filepath.Join(odd, "link0"), "trusted.link", []byte{0, 255}, 0))
	old := time.Date(1911, 1, 2, 3, 4, 5, 678, time.UTC)
	must(os.Chtimes(filepath.Join(odd, "-rf"), old, old))
	f, err := os.Create(filepath.Join(dir, "sparse"))
	must(err)
	for _, off := range []int64{0, 1 << 20, 10 << 20, 30 << 20} {
		_, err = f.WriteAt([]byte("data"), off)
		must(err)
	}
	must(f.Truncate(40 << 20))
	must(f.Close())
}

// mkfs is how kinds are made, in MiB.
// fileSystem is a kind, and how it is made.
type fileSystem struct {
	kind string
	size int64 // MiB
	cmd  string
}

var mkfs = []fileSystem{
	{"ext4", 96, "mkfs.ext4 -q -F -I 256"},
	{"xfs", 320, "mkfs.xfs -q -f"},
	{"btrfs", 160, "mkfs.btrfs -q -f"},
	{"ext3", 96, "mkfs.ext3 -q -F -I 256"},
	{"ext2", 96, "mkfs.ext2 -q -F -I 256"},
	{"vfat", 96, "mkfs.vfat -F 32"},
	{"ntfs", 96, "mkfs.ntfs -q -F"},
}

// empty makes a new one in an image below work, and a directory for it.
func (m fileSystem) empty(t *testing.T, work string) (img, dir string) {
	t.Helper()
	img, dir = filepath.Join(work, m.kind), filepath.Join(work, m.kind+".src")
	run(t, "truncate", "-s", fmt.Sprintf("%dM", m.size), img)
	run(t, "sh", "-c", m.cmd+" "+img+" > /dev/null")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return img, dir
}

// filled makes one with n files and more of every kind, and has see look at them.
func (m fileSystem) filled(t *testing.T, work string, n int, see func(dir string)) (img string) {
	t.Helper()
	img, dir := m.empty(t, work)
	if m.kind == "vfat" {
		fillTree(t, dir, n, m.kind)
		run(t, "sh", "-c", "cd "+dir+" && TZ=UTC LC_ALL=C.UTF-8 mcopy -i "+img+" -s -m -Q * ::")
		see(dir)
		return img
	}
	mountLoop(t, m.kind, img, dir)
	fillTree(t, dir, n, m.kind)
	see(dir)
	run(t, "umount", dir)
	return img
}

// plainOf leaves what a kind of file system keeps.
func plainOf(kind string) func(entry) entry {
	switch kind {
	case "vfat", "ntfs":
		return func(e entry) entry {
			p := entry{mode: e.mode & unix.S_IFMT, size: e.size, hash: e.hash, link: e.link}
			if p.mode == unix.S_IFREG {
				p.mtime = e.mtime
				if kind == "ntfs" {
					p.mtime -= p.mtime % 100
				}
			}
			return p
		}
	}
	return all
}

// mountLoop mounts an image by the host's kernel, or by ntfs-3g.
func mountLoop(t *testing.T, kind, img, dir string) {
	t.Helper()
	if kind == "ntfs" {
		run(t, "ntfs-3g", "-o", "streams_interface=none", img, dir)
		return
	}
	run(t, "mount", "-t", kind, "-o", "loop", img, dir)
}

// files is how many files each file system gets: TIDEMARK_FILES, or few.
func files() int {
	if n, err := strconv.Atoi(os.Getenv("TIDEMARK_FILES")); err == nil {
		return n
	}
	return 60
}

// partitioned puts images into partitions of one disk, in order.
func partitioned(t *testing.T, disk string, images []string) {
	t.Helper()
	var table strings.Builder
	table.WriteString("label: gpt\n")
	at := int64(1 << 20)
	var offs []int64
	for _, img := range images {
		st, err := os.Stat(img)
		if err != nil {
			t.Fatal(err)
		}
		size := (st.Size() + 1<<20 - 1) >> 20 << 20
		fmt.Fprintf(&table, "start=%d, size=%d\n", at/512, size/512)
		offs = append(offs, at)
		at += size
	}
	run(t, "truncate", "-s", fmt.Sprint(at+1<<20), disk)
	c := exec.Command("sfdisk", "-q", disk)
	c.Stdin = strings.NewReader(table.String())
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	for i, img := range images {
		run(t, "dd", "if="+img, "of="+disk, "bs=1M", fmt.Sprintf("seek=%d", offs[i]>>20), "conv=notrunc,sparse", "status=none")
	}
}

// mounted shows a disk image as a point, and gives the directory of its files.
func mounted(t *testing.T, pool *appliance.Pool, disk string) string {
	t.Helper()
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	content, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	repo, _ := disktest.Repo(t)
	t.Cleanup(func() { _ = pool.Close() }) // it reads from the repository; what is wrong is said when it is closed again
	disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: time.Date(2026, 11, 22, 18, 30, 0, 0, time.UTC), Disks: [][]byte{content}})
	if err := unix.Munmap(content); err != nil {
		t.Fatal(err)
	}
	cat := restore.NewCatalog(repo, restore.NewCache(64<<20))
	dir := t.TempDir()
	var told sync.Map
	s, err := fusefs.Mount(t.Context(), dir, cat, fusefs.Options{
		Files: func(p *restore.PointDetails, i int) guestfs.Files {
			return pool.Disk(cat.Identity(p, i), func(ctx context.Context) (restore.Disk, io.Closer, error) { return cat.Open(ctx, p, i) })
		},
		Failed: func(path string, err error) {
			if _, again := told.LoadOrStore(path+err.Error(), true); !again {
				t.Logf("told: %s: %v", path, err)
			}
		},
	})
	if err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Unmount(); err != nil {
			t.Error(err)
		}
		s.Wait()
	})
	return dir + "/vm/latest/disk0.files"
}

func needTools(t *testing.T, tools ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: needs root to mount images")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %v", err)
		}
	}
}

// TestEveryKind compares file systems of real tools with what the mount shows of them.
func TestEveryKind(t *testing.T) {
	needTools(t, "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mkfs.vfat", "mkfs.ntfs", "mcopy", "ntfs-3g", "sfdisk", "setfacl")
	c := config(t)
	work := t.TempDir()
	want := map[string]map[string]entry{}
	var images []string
	for _, m := range mkfs {
		images = append(images, m.filled(t, work, files(), func(dir string) { want[m.kind] = survey(t, dir) }))
	}
	disk := filepath.Join(work, "disk")
	partitioned(t, disk, images)
	dir := mounted(t, newPool(t, c), disk)
	readme, err := os.ReadFile(filepath.Join(dir, "README.txt"))
	t.Logf("%s%v", readme, err)
	for i, m := range mkfs {
		began := time.Now()
		root := filepath.Join(dir, fmt.Sprintf("p%d", i+1))
		got := survey(t, root)
		differ(t, m.kind, want[m.kind], got, plainOf(m.kind))
		t.Logf("%s surveyed in %v", m.kind, time.Since(began))
		if m.kind == "vfat" || m.kind == "ntfs" || m.kind == "ext2" {
			continue
		}
		// Holes are holes.
		f, err := os.Open(filepath.Join(root, "sparse"))
		if err != nil {
			t.Fatal(err)
		}
		data, err := f.Seek(15<<20, unix.SEEK_DATA)
		if err != nil || data != 30<<20 {
			t.Errorf("%s: data of the sparse file after 15 MiB at %d, %v", m.kind, data, err)
		}
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(root, "sparse"), &st); err != nil || st.Blocks > 4096 {
			t.Errorf("%s: the sparse file has %d blocks, %v", m.kind, st.Blocks, err)
		}
		_ = f.Close()
	}
}

// TestCrashConsistent looks at file systems that were copied while they were mounted, after fsync.
func TestCrashConsistent(t *testing.T) {
	needTools(t, "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mkfs.ntfs", "ntfs-3g", "sfdisk")
	c := config(t)
	work := t.TempDir()
	var images, kinds []string
	want := map[string]map[string]entry{}
	for _, m := range append(mkfs[:4:4], mkfs[6]) { // those that have a journal, and ntfs-3g, which writes none
		img, dir := m.empty(t, work)
		mountLoop(t, m.kind, img, dir)
		func() {
			defer run(t, "umount", dir)
			for i := range 100 {
				p := filepath.Join(dir, fmt.Sprintf("synced%d", i))
				f, err := os.Create(p)
				if err != nil {
					t.Fatal(err)
				}
				_, err = f.Write(bytes.Repeat(fmt.Append(nil, m.kind, i), 1+i*20))
				if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
					t.Fatal(err)
				}
			}
			want[m.kind] = survey(t, dir)
			d, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(d.Sync(), d.Close()); err != nil {
				t.Fatal(err)
			}
			run(t, "cp", "--sparse=always", img, img+".copy")
		}()
		images, kinds = append(images, img+".copy"), append(kinds, m.kind)
	}
	disk := filepath.Join(work, "disk")
	partitioned(t, disk, images)
	dir := mounted(t, newPool(t, c), disk)
	for i, kind := range kinds {
		got := survey(t, filepath.Join(dir, fmt.Sprintf("p%d", i+1)))
		synced := 0
		for path, w := range want[kind] {
			if !strings.HasPrefix(path, "synced") {
				continue
			}
			if g, ok := got[path]; ok && g.hash == w.hash && g.size == w.size {
				synced++
			}
		}
		t.Logf("TABLE %s copied while mounted: %d of 100 fsynced files are there and right", kind, synced)
		if synced != 100 {
			t.Errorf("%s: %d of 100 fsynced files", kind, synced)
		}
	}
	readme, err := os.ReadFile(filepath.Join(dir, "README.txt"))
	t.Logf("%s%v", readme, err)
}

// TestRefused looks at what has no tree: each is an error and says why.
func TestRefused(t *testing.T) {
	needTools(t, "sfdisk", "mkswap", "mkfs.ext4")
	c := config(t)
	work := t.TempDir()
	var images []string
	add := func(name string, content []byte) string {
		img := filepath.Join(work, name)
		if err := os.WriteFile(img, content, 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "truncate", "-s", "16M", img)
		images = append(images, img)
		return img
	}
	add("luks", []byte("LUKS\xba\xbe\x00\x02"))
	run(t, "mkswap", "-q", add("swap", nil))
	add("unknown", []byte("nothing"))
	run(t, "mkfs.ext4", "-q", "-F", add("ext4", nil))
	broken := add("broken", nil)
	run(t, "mkfs.ext4", "-q", "-F", broken)
	f, err := os.OpenFile(broken, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{0x5a}, 64), 2048) // group descriptors
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	lvm := make([]byte, 1024)
	copy(lvm[512:], "LABELONE")
	copy(lvm[512+24:], "LVM2 001")
	add("lvm", lvm)
	disk := filepath.Join(work, "disk")
	partitioned(t, disk, images)
	dir := mounted(t, newPool(t, c), disk)
	for i, want := range []syscall.Errno{unix.ENOKEY, unix.EMEDIUMTYPE, unix.EMEDIUMTYPE, 0, unix.EIO, unix.EMEDIUMTYPE} {
		_, err := os.ReadDir(filepath.Join(dir, fmt.Sprintf("p%d", i+1)))
		if want == 0 && err != nil || want != 0 && !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", filepath.Base(images[i]), err, want)
		}
	}
	readme, err := os.ReadFile(filepath.Join(dir, "README.txt"))
	t.Logf("%s%v", readme, err)
	for _, want := range []string{"LUKS: needs a key", "swap space", "no signature", "p5: cannot be mounted", "EXT4-fs", "LVM physical volume"} {
		if !bytes.Contains(readme, []byte(want)) {
			t.Errorf("README.txt does not say %q", want)
		}
	}
}
