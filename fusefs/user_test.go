package fusefs_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/fusefs"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
)

const nobody = 65534

// asNobody makes cmd run as a user without privileges.
func asNobody(t *testing.T, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: only root can become another user")
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	return cmd
}

// openDir makes a directory that all users can reach and write.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tidemark-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestOtherUsersReadOnlyIfAllowed(t *testing.T) {
	needFUSE(t)
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, disktest.Content(1<<20, 1))
	for _, allow := range []bool{false, true} {
		dir := openDir(t)
		s, err := fusefs.Mount(t.Context(), dir, restore.NewCatalog(repo, restore.NewCache(1<<20)), fusefs.Options{AllowOther: allow})
		if err != nil {
			t.Fatal(err)
		}
		out, err := asNobody(t, exec.Command("sha256sum", dir+"/vm/latest/disk0.raw")).CombinedOutput()
		if (err == nil) != allow {
			t.Errorf("AllowOther is %v, but another user gets %s, %v", allow, out, err)
		}
		if err := s.Unmount(); err != nil {
			t.Error(err)
		}
		s.Wait()
	}
}

// userChild names repository and directory to the process of the test below.
const userChild = "TIDEMARK_TEST_MOUNT"

func TestMain(m *testing.M) {
	if args := os.Getenv(userChild); args != "" {
		if err := mountAndHash(args); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// mountAndHash is the life of a plain user's mount.
func mountAndHash(args string) error {
	location, dir, _ := strings.Cut(args, "|")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	repo, err := store.Open(ctx, location)
	if err != nil {
		return err
	}
	s, err := fusefs.Mount(ctx, dir, restore.NewCatalog(repo, restore.NewCache(1<<20)), fusefs.Options{})
	if err != nil {
		return err
	}
	p, err := os.ReadFile(dir + "/vm/latest/disk0.raw")
	if err != nil {
		return err
	}
	fmt.Printf("uid %d sha256 %x\n", os.Getuid(), sha256.Sum256(p))
	if err := s.Unmount(); err != nil {
		return err
	}
	s.Wait()
	return repo.Close()
}

func TestPlainUserMounts(t *testing.T) {
	needFUSE(t)
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: only root can become another user")
	}
	if _, err := exec.LookPath("fusermount3"); err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	if _, err := os.Stat("/etc/mtab"); err != nil {
		t.Skipf("SKIPPED: fusermount3 can't unmount without it: %v", err)
	}
	content := disktest.Content(2<<20, 1)
	base := openDir(t)
	repo, err := store.Init(t.Context(), base+"/repo")
	if err != nil {
		t.Fatal(err)
	}
	publish(t, repo, "vm", evening, content)
	if err := repo.Close(); err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(base, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chown(path, nobody, nobody)
	})
	if err != nil {
		t.Fatal(err)
	}
	self, dir := base+"/self", base+"/mount"
	run(t, "cp", os.Args[0], self)
	run(t, "install", "-d", "-o", fmt.Sprint(nobody), dir)
	// Where udev did not run, /dev/fuse is root's alone: the child gets one of its own.
	device := base + "/fuse"
	if err := unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 229))); err != nil {
		t.Skipf("SKIPPED: no device node can be made: %v", err)
	}
	if err := os.Chmod(device, 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-ec",
		`mount --bind "$1" /dev/fuse; exec setpriv --reuid=65534 --regid=65534 --clear-groups "$2"`, "sh", device, self)
	cmd.Env = append(os.Environ(), userChild+"="+base+"/repo|"+dir)
	out, err := cmd.CombinedOutput()
	if want := fmt.Sprintf("uid %d sha256 %x\n", nobody, sha256.Sum256(content)); err != nil || string(out) != want {
		t.Errorf("got %q, %v, want %q", out, err, want)
	}
}
