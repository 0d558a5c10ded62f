package blob

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Lock implements [Locker] by flock(2) on a file below ".locks". The file stays:
// removing it would let two holders lock two files of one name. It names the
// last holder's process, for people.
func (d *Dir) Lock(ctx context.Context, name string) (unlock func() error, err error) {
	if !ValidName(name) {
		return nil, fmt.Errorf("lock: %w: %q", ErrName, name)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := filepath.Join(d.path, ".locks", name)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	fd := int(f.Fd())
	if _, err := again(func() (int, error) { return 0, unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w%s", ErrLocked, holder(p))
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
	}
	// Only a hint for the message above: failing to write it changes nothing.
	if f.Truncate(0) == nil {
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	return func() error {
		// Closing is not enough: a process that is being started in this moment holds a copy of
		// the descriptor until it executes its program, and the lock with it.
		_, err := again(func() (int, error) { return 0, unix.Flock(fd, unix.LOCK_UN) })
		return errors.Join(err, f.Close())
	}, nil
}

func holder(p string) string {
	b, err := os.ReadFile(p)
	pid := strings.TrimSpace(string(b))
	if err != nil || pid == "" || len(pid) > 12 {
		return ""
	}
	return " (pid " + pid + ")"
}
