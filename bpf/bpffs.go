package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// DefaultDir is where the tracker is pinned.
const DefaultDir = "/sys/fs/bpf/tidemark"

// openDir makes dir below a bpffs and returns it locked: the lock goes with
// the descriptor. It mounts bpffs where the default place has none.
func openDir(dir string) (*dirLock, error) {
	parent := filepath.Dir(dir)
	if !isBPFFS(parent) && parent == filepath.Dir(DefaultDir) {
		if err := unix.Mount("bpf", parent, "bpf", 0, ""); err != nil {
			return nil, fmt.Errorf("mount bpffs at %s: %w", parent, err)
		}
	}
	if !isBPFFS(parent) {
		return nil, fmt.Errorf("%s is not a bpffs: mount one there with -t bpf", parent)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make the tracker's directory: %w", err)
	}
	return lockDir(dir, unix.LOCK_EX)
}

// dirLock is a locked directory, or one that is just open.
type dirLock struct{ f *os.File }

// Close unlocks by word: a process that is just being started has the descriptor too, until it
// executes its program.
func (l *dirLock) Close() error {
	_ = unix.Flock(int(l.f.Fd()), unix.LOCK_UN)
	return l.f.Close()
}

func lockDir(dir string, how int) (*dirLock, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrBusy
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return &dirLock{f}, nil
}

func isBPFFS(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// clearDir unpins everything below dir and leaves dir itself, which is the lock.
func clearDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("unpin: %w", err)
		}
	}
	return nil
}

// slotLocks are the locks of all slots of a tracker.
type slotLocks []*dirLock

// lockSlots takes hold of every device, or fails with ErrBusy. What it took belongs to the
// caller in either case.
func lockSlots(dir string) (slotLocks, error) {
	slots, err := filepath.Glob(filepath.Join(dir, "dev-*"))
	if err != nil {
		return nil, err
	}
	var all slotLocks
	for _, s := range slots {
		l, err := lockDir(s, unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			return all, err
		}
		all = append(all, l)
	}
	return all, nil
}

func (l slotLocks) close() {
	for _, f := range l {
		_ = f.Close()
	}
}
