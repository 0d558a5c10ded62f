package cbt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Untracked is a Source of an image file whose writes nobody sees: all of it is unknown, each
// time. While nobody has it open for writing, that is proven by a read lease (fcntl(2),
// F_SETLEASE): then what was read is one instant.
type Untracked struct {
	file   *os.File
	size   int64 // bytes
	reason string
	told   bool // the whole file was handed out while the lease held

	mu       sync.Mutex
	unleased error // why there is no lease, or none any more
	stop     chan struct{}
	done     chan struct{}
}

var _ Source = (*Untracked)(nil)

// leasePoll is how long a process that opens the file for writing may have to wait.
const leasePoll = 20 * time.Millisecond

// ErrOpenForWriting says that somebody has the file open for writing, or may have.
var ErrOpenForWriting = errors.New("somebody may write to it")

// OpenUntracked opens the image file at path. The reason is why it is not tracked.
func OpenUntracked(path, reason string) (*Untracked, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	u := &Untracked{file: f, size: st.Size(), reason: reason}
	if u.unleased = lease(f); u.unleased == nil {
		u.stop, u.done = make(chan struct{}), make(chan struct{})
		go u.watch()
	}
	return u, nil
}

// leasing are the file systems on which all that opens a file for writing comes by its
// inode: not so on overlayfs, or on what other hosts share.
var leasing = []int64{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.F2FS_SUPER_MAGIC}

func lease(f *os.File) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if !slices.Contains(leasing, st.Type) {
		return fmt.Errorf("%w: its file system can't tell who has it open", ErrOpenForWriting)
	}
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return fmt.Errorf("%w: it is open for writing", ErrOpenForWriting)
	case err != nil:
		return fmt.Errorf("%w: whether it is open for writing can't be told (lease: %w)", ErrOpenForWriting, err)
	}
	return nil
}

// watch gives the lease up as soon as somebody wants to write: until then, the kernel
// lets him wait.
func (u *Untracked) watch() {
	defer close(u.done)
	tick := time.NewTicker(leasePoll)
	defer tick.Stop()
	for {
		select {
		case <-u.stop:
			return
		case <-tick.C:
			if u.leased() != nil {
				return
			}
		}
	}
}

// leased is nil as long as nobody has opened the file for writing.
func (u *Untracked) leased() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.unleased != nil {
		return u.unleased
	}
	// While a break is pending, this is what it will become.
	n, err := unix.FcntlInt(u.file.Fd(), unix.F_GETLEASE, 0)
	if err != nil || n != unix.F_RDLCK {
		u.unleased = fmt.Errorf("%w: it was opened for writing while it was read", ErrOpenForWriting)
		_, _ = unix.FcntlInt(u.file.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	}
	return u.unleased
}

// Changes implements Source.
func (u *Untracked) Changes(ctx context.Context, _ ChangeID) (Delta, error) {
	none := Evidence{Method: "none", Size: u.size}
	st, err := u.file.Stat()
	if err == nil && st.Size() != u.size {
		err = fmt.Errorf("%s: %w: it had %d bytes and has %d", u.file.Name(), ErrDeviceChanged, u.size, st.Size())
	}
	if err = errors.Join(err, ctx.Err()); err != nil {
		return Delta{}, err
	}
	if err = u.leased(); err == nil && u.told {
		return Delta{Evidence: none}, nil
	}
	d := Delta{Extents: Whole(u.size), Unknown: []string{u.reason}, Evidence: none}
	if u.told = err == nil; !u.told {
		d.Unknown = append(d.Unknown, err.Error())
	}
	return d, nil
}

// Quiet implements Source: as long as the lease holds under which the file was handed out, nobody
// can write.
func (u *Untracked) Quiet() (bool, Evidence, error) {
	return u.leased() == nil && u.told, Evidence{Method: "none", Size: u.size}, nil
}

// Prepare implements Source.
func (u *Untracked) Prepare() error { return nil }

// Commit implements Source.
func (u *Untracked) Commit(ChangeID) error { return nil }

// Writes implements Source: none, as long as nobody has the file open for writing. Errors
// wrap ErrUncounted.
func (u *Untracked) Writes() (uint64, error) {
	if err := u.leased(); err != nil {
		return 0, fmt.Errorf("%w (%s): %w", ErrUncounted, u.reason, err)
	}
	return 0, nil
}

// Close implements Source.
func (u *Untracked) Close() error {
	if u.stop != nil {
		close(u.stop)
		<-u.done
	}
	return u.file.Close()
}
