package agent

import (
	"context"
	"errors"
	"fmt"
	"os"

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
	f      *os.File
	frozen bool
}

func (z *freezePauser) Method() string                 { return "freeze" }
func (z *freezePauser) Consistency() store.Consistency { return store.Filesystem }
func (z *freezePauser) rescue() rescue                 { return rescue{Kind: "freeze", Target: z.dir} }

func (z *freezePauser) Prepare(context.Context) error {
	var err error
	if z.f, err = os.Open(z.dir); err != nil {
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
	z.frozen = true
	return nil
}

func (z *freezePauser) Resume(context.Context) error {
	if !z.frozen {
		return nil
	}
	if err := unix.IoctlSetInt(int(z.f.Fd()), fiThaw, 0); err != nil {
		return fmt.Errorf("thaw %s: %w", z.dir, err)
	}
	z.frozen = false
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
