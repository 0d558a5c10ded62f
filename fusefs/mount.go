package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/restore"
)

// The errors of [Mount] and [Server.Unmount] that a caller may want to tell apart.
var (
	ErrNoFUSE     = errors.New("no FUSE: /dev/fuse cannot be opened")
	ErrNoHelper   = errors.New("a plain user needs fusermount3 to mount: install the package fuse3")
	ErrAllowOther = errors.New("a plain user may let others read only if a line of /etc/fuse.conf says user_allow_other")
	ErrBusy       = errors.New("mount is in use")
)

// Options say how to mount. The zero value will do.
type Options struct {
	// AllowOther lets other users read too. Without it only the user who
	// mounted may, not even root. For plain users /etc/fuse.conf must say
	// user_allow_other.
	AllowOther bool

	// Refresh is how long a listing of VMs or points may be used before the repository
	// is asked again, which it is only when somebody looks; 0 means one second. A listing that takes
	// longer than a tenth of it to read is used ten times as long as that. It takes up to
	// twice as long until a new point is seen or a deleted one is gone.
	Refresh time.Duration

	// Files, if set, gives the guest's own files in a disk of a point, which are shown below
	// <disk>.files. It is called by many goroutines, and must not wait.
	Files func(p *restore.PointDetails, disk int) guestfs.Files

	// Failed, if set, is told why a call on the path, relative to the mount, got an
	// I/O error. It is called by many goroutines.
	Failed func(path string, err error)
}

// requestSize is what one read request carries at most, in bytes: the
// largest that the kernel knows.
const requestSize = 1 << 20

// Server serves one mount, in goroutines of its own, until it is unmounted.
type Server struct {
	dir  string
	fuse *fuse.Server
	tree *tree

	unmounting sync.Mutex
	served     chan struct{} // closed when the kernel has let go
	left       chan struct{} // closed when the mount was detached while in use
	done       chan struct{} // closed when all is cleaned up
}

// Mount shows the catalog at the directory dir. Root mounts by itself, a plain user with the help
// of fusermount3. When ctx is done, the tree is unmounted, even if it is in
// use; until then the catalog must stay open. Errors: [ErrNoFUSE], [ErrNoHelper], [ErrAllowOther], or
// those of the mount.
func Mount(ctx context.Context, dir string, catalog *restore.Catalog, o Options) (*Server, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if st, err := os.Stat(dir); err != nil {
		return nil, err
	} else if !st.IsDir() {
		return nil, &os.PathError{Op: "mount", Path: dir, Err: syscall.ENOTDIR}
	}
	// fusermount3 opens it as the user too.
	if err := unix.Access("/dev/fuse", unix.R_OK|unix.W_OK); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoFUSE, err)
	}
	if os.Geteuid() != 0 {
		if err := checkHelper(o.AllowOther, fuseConf); err != nil {
			return nil, err
		}
	}
	t := newTree(context.WithoutCancel(ctx), catalog, o)
	server, err := fs.Mount(dir, t.root, mountOptions(catalog, o))
	if err != nil {
		t.close()
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	tuneReadAhead(dir)
	s := &Server{dir: dir, fuse: server, tree: t, served: make(chan struct{}), left: make(chan struct{}), done: make(chan struct{})}
	go func() {
		server.Wait()
		close(s.served)
	}()
	go s.watch(ctx)
	return s, nil
}

// fuseConf is what fusermount3 reads.
const fuseConf = "/etc/fuse.conf"

// checkHelper says what fusermount3 would refuse, or that there is none.
func checkHelper(allowOther bool, conf string) error {
	if _, err := exec.LookPath("fusermount3"); err != nil {
		if _, err := os.Stat("/bin/fusermount3"); err != nil { // where go-fuse looks too
			return ErrNoHelper
		}
	}
	if !allowOther {
		return nil
	}
	text, err := os.ReadFile(conf)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrAllowOther, err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.TrimSpace(line) == "user_allow_other" {
			return nil
		}
	}
	return ErrAllowOther
}

func mountOptions(catalog *restore.Catalog, o Options) *fs.Options {
	// "ro" makes every write end in EROFS before it comes to us.
	options := []string{"ro"}
	if o.AllowOther {
		// Others may read what the modes and owners of the guest allow them. Who mounts can read the disk itself,
		// so nothing of it is kept from them.
		options = append(options, "default_permissions")
	}
	return &fs.Options{
		NullPermissions: true, // a guest's file of mode 0 has mode 0
		MountOptions: fuse.MountOptions{
			Name:             "tidemark",
			FsName:           "tidemark-" + catalog.ID(),
			AllowOther:       o.AllowOther,
			DisableXAttrs:    o.Files == nil,
			DirectMount:      true, // first; else fusermount3
			DirectMountFlags: unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV,
			Options:          options,
			MaxWrite:         requestSize,
			MaxReadAhead:     requestSize,
			MaxBackground:    64,
			DisableSplice:    true, // what we answer lies in memory: a pipe would be filled in vain
			Logger:           log.New(io.Discard, "", 0),
		},
	}
}

// tuneReadAhead has the kernel read ahead as much as fits one request. It
// caps what the file system asks for at 128 KiB; the privileged may raise it. If it
// cannot be done, reads are slower and nothing else.
func tuneReadAhead(dir string) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return
	}
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	_ = os.WriteFile(path, fmt.Appendf(nil, "%d", requestSize>>10), 0)
}

// watch waits for the end of the mount or of ctx, and cleans up.
func (s *Server) watch(ctx context.Context) {
	defer close(s.done)
	select {
	case <-s.served:
	case <-ctx.Done():
		s.tree.cancel() // reads under way must not hold the mount
		if err := s.Unmount(); err != nil {
			s.detach()
		}
		select {
		case <-s.served:
		case <-s.left:
		}
	}
	s.tree.close()
}

// Wait waits until the tree is unmounted, by whomever.
func (s *Server) Wait() { <-s.done }

// Unmount unmounts the tree and waits until it is done. It fails with [ErrBusy]
// while a file is open or a process has its directory there. It does nothing if the tree is
// unmounted already.
func (s *Server) Unmount() error {
	s.unmounting.Lock()
	defer s.unmounting.Unlock()
	select {
	case <-s.served:
		return nil
	case <-s.left:
		return nil
	default:
	}
	if err := s.fuse.Unmount(); err != nil {
		select {
		case <-s.served: // someone else was faster
			return nil
		default:
		}
		return fmt.Errorf("unmount %s: %w: %w", s.dir, ErrBusy, err)
	}
	<-s.served
	return nil
}

// detach takes a mount that is in use out of the tree of files. Its users see
// errors from then on.
func (s *Server) detach() {
	s.unmounting.Lock()
	defer s.unmounting.Unlock()
	if unix.Unmount(s.dir, unix.MNT_DETACH) != nil {
		// As a plain user. If that fails too, the mount dies with the process.
		_ = exec.CommandContext(context.Background(), "fusermount3", "-u", "-z", s.dir).Run()
	}
	close(s.left)
}
