package blob

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// tempFile is a file on its way to become an object.
type tempFile struct {
	d    *Dir
	f    *os.File
	name string // "" if the file has none (O_TMPFILE)
}

// newTemp makes a file in folder that no listing shows.
func (d *Dir) newTemp(folder string) (*tempFile, error) {
	if err := d.step(StepCreate, folder); err != nil {
		return nil, err
	}
	d.mu.Lock()
	named := d.named
	d.mu.Unlock()
	if !named {
		// Not O_EXCL: that would forbid the link (open(2)).
		fd, err := again(func() (int, error) {
			return unix.Open(folder, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		})
		if err == nil {
			return &tempFile{d: d, f: os.NewFile(uintptr(fd), filepath.Join(folder, "(unnamed)"))}, nil
		}
		// EISDIR: a kernel or file system that does not know the flag.
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
			return nil, fmt.Errorf("make file in %s: %w", folder, err)
		}
		d.mu.Lock()
		d.named = true
		d.mu.Unlock()
	}
	// Leading dot: no object, never listed. A crash leaves it behind.
	name := filepath.Join(folder, ".tmp-"+rand.Text())
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &tempFile{d: d, f: f, name: name}, nil
}

// link gives the file its name, or fails with EEXIST.
func (t *tempFile) link(to string) error {
	if err := t.d.step(StepLink, to); err != nil {
		return err
	}
	if t.name == "" {
		// AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH; /proc does not.
		from := fmt.Sprintf("/proc/self/fd/%d", t.f.Fd())
		err := unix.Linkat(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.AT_SYMLINK_FOLLOW)
		if err != nil {
			return &os.LinkError{Op: "linkat", Old: from, New: to, Err: err}
		}
		return nil
	}
	err := os.Link(t.name, to)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) {
		// A file system without hard links.
		if err := t.d.step(StepRename, to); err != nil {
			return err
		}
		if err = unix.Renameat2(unix.AT_FDCWD, t.name, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
			return &os.LinkError{Op: "renameat2", Old: t.name, New: to, Err: err}
		}
		t.name = ""
	}
	return err
}

// discard closes the file and removes its temporary name, if it has one still.
// What could fail here was synced or is not wanted.
func (t *tempFile) discard() {
	_ = t.f.Close()
	if t.name != "" {
		_ = os.Remove(t.name)
	}
}
