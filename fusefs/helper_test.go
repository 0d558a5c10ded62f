package fusefs

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestWhatPlainUsersLack(t *testing.T) {
	dir := t.TempDir()
	conf := func(text string) string {
		path := filepath.Join(dir, "fuse.conf")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if _, err := exec.LookPath("fusermount3"); err != nil {
		if err := checkHelper(false, conf("")); !errors.Is(err, ErrNoHelper) {
			t.Errorf("without fusermount3: %v", err)
		}
		t.Skipf("SKIPPED in part: %v", err)
	}
	for text, want := range map[string]error{"": ErrAllowOther, "#user_allow_other\n": ErrAllowOther, "mount_max = 10\n user_allow_other \n": nil} {
		if err := checkHelper(true, conf(text)); !errors.Is(err, want) {
			t.Errorf("fuse.conf says %q: %v, want %v", text, err, want)
		}
	}
	if err := checkHelper(true, filepath.Join(dir, "none")); !errors.Is(err, ErrAllowOther) {
		t.Errorf("without fuse.conf: %v", err)
	}
	if err := checkHelper(false, conf("")); err != nil {
		t.Errorf("for the user alone: %v", err)
	}
	if _, err := os.Stat("/bin/fusermount3"); err != nil {
		t.Setenv("PATH", dir)
		if err := checkHelper(false, conf("")); !errors.Is(err, ErrNoHelper) {
			t.Errorf("without fusermount3: %v", err)
		}
	}
}
