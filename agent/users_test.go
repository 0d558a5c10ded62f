package agent

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// stuck is a file of a server that stops answering.
type stuck struct {
	fs.MemRegularFile
	hangs atomic.Bool
	let   chan struct{} // closed when it answers again
	asked atomic.Int64
}

func (s *stuck) Getattr(ctx context.Context, f fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	s.asked.Add(1)
	if s.hangs.Load() {
		<-s.let
	}
	return s.MemRegularFile.Getattr(ctx, f, out)
}

// A process that has a file open whose server hangs does not hang who looks for the users of a disk.
func TestUsersOfADiskBesideAServerThatHangs(t *testing.T) {
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Geteuid() != 0 {
		t.Skip("SKIP: needs root and /dev/fuse")
	}
	file := &stuck{let: make(chan struct{}), MemRegularFile: fs.MemRegularFile{Data: []byte("x")}}
	root := &fs.Inode{}
	dir := t.TempDir()
	srv, err := fs.Mount(dir, root, &fs.Options{
		OnAdd: func(ctx context.Context) {
			root.AddChild("file", root.NewPersistentInode(ctx, file, fs.StableAttr{Ino: 7}), false)
		},
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "stuck"},
	})
	if err != nil {
		t.Skipf("SKIP: FUSE can't be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := srv.Unmount(); err != nil {
			t.Error(err)
		}
	})
	f, err := os.OpenFile(filepath.Join(dir, "file"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	disk, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = disk.Close() }()
	var want unix.Stat_t
	if err := unix.Fstat(int(disk.Fd()), &want); err != nil {
		t.Fatal(err)
	}

	file.hangs.Store(true)
	done := make(chan []bool)
	go func() { done <- hasOpen(os.Getpid(), []unix.Stat_t{want}) }()
	select {
	case open := <-done:
		close(file.let)
		if len(open) != 1 || !open[0] {
			t.Errorf("a file that is open for writing: %v", open)
		}
	case <-time.After(10 * time.Second):
		close(file.let)
		<-done
		t.Errorf("it waited for the server, which was asked %d times", file.asked.Load())
	}
}
