package blob_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/store/blob"
)

// A process that is being started has copies of all descriptors for a moment.
func TestUnlockDoesNotWaitForCopiesOfTheDescriptor(t *testing.T) {
	d, err := blob.CreateDir(filepath.Join(t.TempDir(), "r"))
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := d.Lock(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	copied := 0
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		link := filepath.Join("/proc/self/fd", fd.Name())
		if to, err := os.Readlink(link); err != nil || to != d.Path()+"/.locks/x" {
			continue
		}
		n, err := strconv.Atoi(fd.Name())
		if err != nil {
			t.Fatal(err)
		}
		dup, err := unix.FcntlInt(uintptr(n), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(dup) }()
		copied++
		break // the copy may have taken the place of the list's own descriptor
	}
	if copied != 1 {
		t.Fatalf("found %d descriptors of the lock", copied)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	if unlock, err = d.Lock(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
}
