package appliance_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/guestfs"
)

// TestCorrupted walks file systems in which random bytes were changed: each ends with files or with an error, and the host
// lives on. TIDEMARK_CORRUPT is how many of each kind.
func TestCorrupted(t *testing.T) {
	needTools(t, "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mkfs.vfat", "mkfs.ntfs", "mcopy", "ntfs-3g", "sfdisk")
	rounds, err := strconv.Atoi(os.Getenv("TIDEMARK_CORRUPT"))
	if err != nil {
		t.Skip("SKIPPED: takes minutes: `make test-files` runs it")
	}
	c := config(t)
	c.Idle = time.Minute
	pool := newPool(t, c)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	work := t.TempDir()
	for _, m := range mkfs {
		if m.kind == "ext2" || m.kind == "ext3" {
			continue
		}
		img := m.filled(t, work, 100, func(string) {})
		var whole, refused, partly, lost, hung int
		for done := 0; done < rounds; {
			var images []string
			for ; done < rounds && len(images) < 25; done++ {
				bad := filepath.Join(work, fmt.Sprintf("%s.%d", m.kind, done))
				run(t, "cp", "--sparse=always", img, bad)
				damage(t, bad, rnd)
				images = append(images, bad)
			}
			disk := filepath.Join(work, fmt.Sprintf("%s.disk%d", m.kind, done))
			partitioned(t, disk, images)
			d := pool.Disk(disk, image(disk))
			for i := range images {
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
				failed, err := walk(ctx, d, fmt.Sprintf("p%d", i+1))
				var v *guestfs.VolumeError
				switch {
				case ctx.Err() != nil:
					hung++
					t.Errorf("%s: %v after 3 minutes", images[i], err)
				case errors.Is(err, guestfs.ErrLost):
					lost++
					t.Logf("%s: %v", m.kind, err)
				case errors.As(err, &v):
					refused++
				case err != nil:
					t.Errorf("%s: %v", images[i], err)
				case failed > 0:
					partly++
				default:
					whole++
				}
				cancel()
			}
			for _, f := range append(images, disk) {
				_ = os.Remove(f)
			}
		}
		t.Logf("TABLE %-6s %d damaged: %d read without an error, %d with errors, %d refused, %d ended their appliance, %d hung", m.kind, rounds, whole, partly, refused, lost, hung)
	}
}

// damage changes bytes where there is something.
func damage(t *testing.T, path string, rnd *rand.Rand) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	for range 1 + rnd.IntN(40) {
		at, err := f.Seek(rnd.Int64N(st.Size()-8192), unix.SEEK_DATA)
		if err != nil || rnd.IntN(3) == 0 {
			at = rnd.Int64N(256 << 10)
		}
		b := make([]byte, 1+rnd.IntN(16))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		if _, err := f.WriteAt(b, min(at+rnd.Int64N(4096), st.Size()-16)); err != nil {
			t.Fatal(err)
		}
	}
}

// walk reads all there is, but no more than a damaged directory may pretend to have. It counts the errors.
func walk(ctx context.Context, d guestfs.Files, volume string) (failed int, err error) {
	tree, err := d.Tree(ctx, volume)
	if err != nil {
		return 0, err
	}
	left := 5000
	buf := make([]byte, 256<<10)
	var in func(path string, depth int) error
	check := func(err error) error {
		if errors.Is(err, guestfs.ErrLost) || ctx.Err() != nil {
			return err
		}
		failed++
		return nil
	}
	in = func(path string, depth int) error {
		for e, err := range tree.ReadDir(ctx, path) {
			if err == nil {
				err = e.Err
			}
			if err != nil {
				if err := check(err); err != nil {
					return err
				}
				continue
			}
			if left--; left < 0 {
				return nil
			}
			p := e.Name
			if path != "" {
				p = path + "/" + p
			}
			switch e.Attr.Mode & unix.S_IFMT {
			case unix.S_IFDIR:
				if depth < 20 {
					if err := in(p, depth+1); err != nil {
						return err
					}
				}
			case unix.S_IFREG:
				f, _ := tree.Open(ctx, p)
				if _, err := f.ReadAtContext(ctx, buf, 0); err != nil && err.Error() != "EOF" {
					if err := check(err); err != nil {
						return err
					}
				}
			case unix.S_IFLNK:
				if _, err := tree.Readlink(ctx, p); err != nil {
					if err := check(err); err != nil {
						return err
					}
				}
			}
			if _, err := tree.Xattrs(ctx, p); err != nil {
				if err := check(err); err != nil {
					return err
				}
			}
		}
		return nil
	}
	err = in("", 0)
	return failed, err
}
