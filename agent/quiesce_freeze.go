package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/store"
)

// include/uapi/linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// freezePauser freezes a file system that is mounted on this host: it is
// clean on disk while frozen (freeze_super in fs/super.c).
type freezePauser struct {
	dir    string
	disks  []string // paths
	f      *os.File
	alone  bool // nothing else of the disks is mounted
	frozen atomic.Bool
}

func (z *freezePauser) Method() string { return "freeze" }

// Consistency is filesystem only if all that is mounted of the disks is frozen.
func (z *freezePauser) Consistency() store.Consistency {
	if z.alone {
		return store.Filesystem
	}
	return store.Crash
}

// Running is true: whether a file system is frozen can't be asked. One that is fails
// to be frozen again.
func (z *freezePauser) Running(context.Context) (bool, error) { return true, nil }
func (z *freezePauser) rescue() rescue                        { return rescue{Kind: "freeze", Target: z.dir} }

func (z *freezePauser) Prepare(context.Context) error {
	dir, err := filepath.Abs(z.dir)
	if err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	var mounts []string
	for _, d := range z.disks {
		m, err := mountsOf(d)
		if err != nil {
			return err
		}
		mounts = append(mounts, m...)
	}
	if !slices.Contains(mounts, dir) {
		return fmt.Errorf("freeze %s: %w: nothing of %s is mounted there", z.dir, ErrQuiesceSyntax, strings.Join(z.disks, ", "))
	}
	z.alone = len(z.disks) == 1 && len(mounts) == 1
	if z.f, err = os.Open(dir); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	return nil
}

func (z *freezePauser) Flush(context.Context) error {
	if err := unix.Syncfs(int(z.f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", z.dir, err)
	}
	return nil
}

func (z *freezePauser) Pause(context.Context) error {
	if err := unix.IoctlSetInt(int(z.f.Fd()), fiFreeze, 0); err != nil {
		return fmt.Errorf("freeze %s: %w", z.dir, err)
	}
	z.frozen.Store(true)
	return nil
}

func (z *freezePauser) Resume(context.Context) error {
	if !z.frozen.Swap(false) {
		return nil
	}
	if err := unix.IoctlSetInt(int(z.f.Fd()), fiThaw, 0); err != nil {
		return fmt.Errorf("thaw %s: %w", z.dir, err)
	}
	return nil
}

func (z *freezePauser) Close() error {
	if z.f == nil {
		return nil
	}
	return errors.Join(z.Resume(context.Background()), z.f.Close())
}

func rescueFreeze(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	// EINVAL: it was not frozen.
	if err := unix.IoctlSetInt(int(f.Fd()), fiThaw, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("thaw %s: %w", dir, err)
	}
	return nil
}
