package nbd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestUnixSocketIsForItsOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket stays after Close: %v", err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	left, err := filepath.Glob(path + ".*")
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

func TestSocketInUseIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if _, err := Listen(t.Context(), "unix", path); !errors.Is(err, ErrSocketBusy) {
		t.Errorf("second listener: %v", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Errorf("first listener is gone: %v", err)
	} else {
		_ = c.Close()
	}
}

func TestFileInPlaceOfASocketIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), "unix", path); !errors.Is(err, ErrSocketBusy) {
		t.Errorf("%v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("file has %q, %v", b, err)
	}
}

func TestListenErrors(t *testing.T) {
	if _, err := Listen(t.Context(), "udp", "127.0.0.1:0"); !errors.As(err, new(net.UnknownNetworkError)) {
		t.Errorf("udp: %v", err)
	}
	if _, err := Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "missing", "s")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("missing folder: %v", err)
	}
}

func TestSocketGetsItsModeAndGroup(t *testing.T) {
	group := os.Getegid()
	if os.Geteuid() == 0 {
		group = 12345 // root may give a socket to any
	}
	old := syscall.Umask(0o077) // which must not narrow what was asked for
	defer syscall.Umask(old)
	for _, c := range []struct {
		mode SocketMode
		perm os.FileMode
		gid  int
	}{
		{SocketMode{Perm: 0o660, Group: group}, 0o660, group},
		{SocketMode{Perm: 0o666}, 0o666, os.Getegid()},
		{SocketMode{Group: group}, 0o600, group},
		{SocketMode{}, 0o600, os.Getegid()},
	} {
		path := filepath.Join(t.TempDir(), "s")
		l, err := ListenMode(t.Context(), "unix", path, c.mode)
		if err != nil {
			t.Fatal(err)
		}
		st, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if gid := int(st.Sys().(*syscall.Stat_t).Gid); st.Mode().Perm() != c.perm || gid != c.gid {
			t.Errorf("%+v: mode %v, group %d", c.mode, st.Mode(), gid)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Others look at the folder all the time while sockets are made in it: none ever
// has rights that were not asked for.
func TestSocketIsNeverOpenerThanAskedFor(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	want := os.FileMode(0o640)
	done := make(chan struct{})
	worst := make(chan os.FileMode, 1)
	go func() {
		var seen os.FileMode
		for {
			if st, err := os.Lstat(path); err == nil {
				seen |= st.Mode().Perm()
			}
			select {
			case <-done:
				worst <- seen
				return
			default:
			}
		}
	}()
	for range 300 {
		l, err := ListenMode(t.Context(), "unix", path, SocketMode{Perm: want})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	close(done)
	if seen := <-worst; seen&^want != 0 || seen == 0 {
		t.Errorf("seen with rights %v", seen)
	}
}

func TestSocketWhoseRightsFailIsNotLeft(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may give a socket to any group")
	}
	path := filepath.Join(t.TempDir(), "s")
	if l, err := ListenMode(t.Context(), "unix", path, SocketMode{Perm: 0o660, Group: 12345}); err == nil {
		_ = l.Close()
		t.Fatal("a group that is not ours was accepted")
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket is left: %v", err)
	}
}
