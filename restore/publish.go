package restore

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Publish gives the complete file at tmp its name and makes the name durable.
// Unless replace is set, it fails with os.ErrExist if the name is taken.
func Publish(tmp, path string, replace bool) error {
	var err error
	if replace {
		err = os.Rename(tmp, path)
	} else {
		err = renameNew(tmp, path)
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func renameNew(tmp, path string) error {
	err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// Some file systems (NFS) know no such rename, but links.
		if err := os.Link(tmp, path); err != nil {
			return err
		}
		return os.Remove(tmp)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: tmp, New: path, Err: err}
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
