package blob

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
)

// Preloader is implemented by stores that can have a part of an object brought near while their
// caller does other work.
type Preloader interface {
	// Preload says that n bytes from off, or as many as there are, will be read soon. It does not wait
	// for them, and changes nothing but how long that takes.
	Preload(ctx context.Context, name string, off, n int64) error
}

// Preload is [Preloader] for every store: it does nothing where it is not implemented.
func Preload(ctx context.Context, s Store, name string, off, n int64) error {
	if p, ok := s.(Preloader); ok {
		return p.Preload(ctx, name, off, n)
	}
	return nil
}

var _ Preloader = (*Dir)(nil)

// Preload implements [Preloader] by the kernel's page cache.
func (d *Dir) Preload(ctx context.Context, name string, off, n int64) error {
	fd, err := d.openFD(ctx, name)
	if err != nil {
		return fmt.Errorf("preload %s: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }() // read only: nothing to lose
	if err := unix.Fadvise(fd, off, n, unix.FADV_WILLNEED); err != nil {
		return fmt.Errorf("preload %s: %w", name, err)
	}
	return nil
}
