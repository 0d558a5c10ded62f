package appliance

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/guestfs"
)

// server answers requests inside the appliance.
type server struct {
	volumes []guestfs.Volume
	mount   func(v guestfs.Volume) (root int, err error) // O_PATH descriptor of the root

	mu     sync.Mutex
	mounts map[string]*mounted
	files  fileCache
}

type mounted struct {
	once sync.Once
	root int
	err  error
}

func newServer(volumes []guestfs.Volume, mount func(guestfs.Volume) (int, error)) *server {
	return &server{volumes: volumes, mount: mount, mounts: map[string]*mounted{}, files: fileCache{open: map[fileKey]*cachedFile{}}}
}

// atOnce is how many requests are served at the same time.
const atOnce = 16

// serve answers until the other side is gone.
func (s *server) serve(r io.Reader, w io.Writer) error {
	var writing sync.Mutex
	tokens := make(chan struct{}, atOnce)
	var wait sync.WaitGroup
	defer wait.Wait()
	if err := writeFrame(w, 0, []byte(version)); err != nil {
		return err
	}
	for {
		id, body, err := readFrame(r)
		if err != nil {
			return err
		}
		tokens <- struct{}{}
		wait.Go(func() {
			defer func() { <-tokens }()
			out := s.answer(body)
			writing.Lock()
			defer writing.Unlock()
			_ = writeFrame(w, id, out) // if it fails, so does the next read
		})
	}
}

func (s *server) answer(body []byte) []byte {
	r, err := decodeRequest(body)
	if err != nil {
		return fail(failErrno, unix.EPROTO, "")
	}
	e := encoder{b: []byte{0}}
	if err := s.do(&r, &e); err != nil {
		var errno syscall.Errno
		var v *guestfs.VolumeError
		switch {
		case errors.As(err, &v):
			class := failMount
			switch {
			case errors.Is(err, guestfs.ErrKey):
				class = failKey
			case errors.Is(err, guestfs.ErrNoFiles):
				class = failNoFiles
			case errors.Is(err, guestfs.ErrNoVolume):
				class = failNoVolume
			}
			return fail(class, 0, v.Reason)
		case errors.As(err, &errno):
			return fail(failErrno, errno, "")
		}
		return fail(failErrno, unix.EIO, "")
	}
	return e.b
}

func (s *server) do(r *request, e *encoder) error {
	if r.op == opVolumes {
		for _, v := range s.volumes {
			e.volume(v)
		}
		return nil
	}
	root, err := s.root(r.volume)
	if err != nil {
		return err
	}
	switch r.op {
	case opMount:
		return nil
	case opLstat:
		fd, name, done, err := parent(root, r.path)
		if err != nil {
			return err
		}
		defer done()
		a, err := lstat(fd, name)
		if err == nil {
			e.attr(a)
		}
		return err
	case opReadDir:
		return readDir(root, r, e)
	case opRead:
		return s.read(root, r, e)
	case opReadlink:
		fd, name, done, err := parent(root, r.path)
		if err != nil {
			return err
		}
		defer done()
		b := make([]byte, unix.PathMax+1)
		n, err := unix.Readlinkat(fd, name, b)
		if err == nil {
			e.string(string(b[:n]))
		}
		return err
	case opXattrs:
		return xattrs(root, r, e)
	case opSeekData, opSeekHole:
		whence := unix.SEEK_DATA
		if r.op == opSeekHole {
			whence = unix.SEEK_HOLE
		}
		f, err := s.files.get(r.volume, r.path, root)
		if err != nil {
			return err
		}
		defer s.files.put(f)
		f.seeking.Lock() // the offset is shared
		defer f.seeking.Unlock()
		off, err := unix.Seek(f.fd, r.off, whence)
		if err == nil {
			e.int(off)
		}
		return err
	}
	return unix.EPROTO
}

// root mounts the volume, once.
func (s *server) root(name string) (int, error) {
	for _, v := range s.volumes {
		if v.Name != name {
			continue
		}
		if v.State == guestfs.NotFiles {
			err := guestfs.ErrNoFiles
			if v.Kind == "luks" || v.Kind == "bitlocker" {
				err = guestfs.ErrKey
			}
			return -1, &guestfs.VolumeError{Volume: name, Err: err, Reason: v.Why}
		}
		s.mu.Lock()
		m := s.mounts[name]
		if m == nil {
			m = &mounted{}
			s.mounts[name] = m
		}
		s.mu.Unlock()
		m.once.Do(func() { m.root, m.err = s.mount(v) })
		return m.root, m.err
	}
	return -1, &guestfs.VolumeError{Volume: name, Err: guestfs.ErrNoVolume}
}

// open opens a path below root without following symbolic links. Paths may be longer than the kernel takes at once.
func open(root int, path string, flags int) (int, error) {
	const most = 4000
	at, ours := root, false
	for {
		how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS}
		part, rest := path, ""
		if len(path) > most {
			i := strings.LastIndexByte(path[:most], '/')
			if i < 0 {
				return -1, unix.ENAMETOOLONG
			}
			part, rest = path[:i], path[i+1:]
			how.Flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
		}
		if part == "" {
			part = "."
		}
		fd, err := unix.Openat2(at, part, &how)
		if ours {
			_ = unix.Close(at)
		}
		if err != nil || rest == "" {
			return fd, err
		}
		at, ours, path = fd, true, rest
	}
}

// parent opens the directory that holds path, for calls that take a name in it.
func parent(root int, path string) (fd int, name string, done func(), err error) {
	if path == "" {
		return root, ".", func() {}, nil
	}
	dir, name := "", path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		dir, name = path[:i], path[i+1:]
	}
	if !validName(name) {
		return -1, "", nil, unix.EINVAL
	}
	fd, err = open(root, dir, unix.O_PATH|unix.O_DIRECTORY)
	return fd, name, func() { _ = unix.Close(fd) }, err
}

func lstat(fd int, name string) (guestfs.Attr, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return guestfs.Attr{}, err
	}
	at := func(t unix.Timespec) time.Time { return time.Unix(t.Sec, t.Nsec) }
	return guestfs.Attr{
		Dev: st.Dev, Ino: st.Ino, Mode: st.Mode, Nlink: uint32(st.Nlink), UID: st.Uid, GID: st.Gid, Rdev: st.Rdev,
		Size: st.Size, Blocks: st.Blocks, Blksize: uint32(st.Blksize), Atime: at(st.Atim), Mtime: at(st.Mtim), Ctime: at(st.Ctim),
	}, nil
}

// readDir answers a part of a directory, from the cookie on.
func readDir(root int, r *request, e *encoder) error {
	fd, err := open(root, r.path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if r.off != 0 {
		if _, err := unix.Seek(fd, r.off, unix.SEEK_SET); err != nil {
			return err
		}
	}
	// An entry takes about 24 bytes and its name here, 70 and its name in the answer.
	buf := make([]byte, 64<<10)
	next, last := r.off, false
	var list encoder
	for found := false; !found && !last; {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			return err
		}
		last = n <= 0
		for b := buf[:max(n, 0)]; len(b) >= 19; {
			// struct linux_dirent64: d_ino, d_off, d_reclen, d_type, d_name
			size := int(binary.LittleEndian.Uint16(b[16:]))
			if size < 19 || size > len(b) {
				return unix.EIO
			}
			next = int64(binary.LittleEndian.Uint64(b[8:]))
			name, _, _ := strings.Cut(string(b[19:size]), "\x00")
			kind := uint32(b[18]) << 12
			ino := binary.LittleEndian.Uint64(b)
			b = b[size:]
			if name == "." || name == ".." {
				continue
			}
			if !validName(name) { // a damaged directory
				return unix.EIO
			}
			x := guestfs.DirEntry{Name: name}
			if x.Attr, x.Err = lstat(fd, name); x.Err != nil {
				if !validType(kind) {
					kind = unix.S_IFREG
				}
				x.Attr = guestfs.Attr{Ino: ino, Mode: kind}
			}
			list.entry(x)
			found = true
		}
	}
	var lastFlag uint64
	if last {
		lastFlag = 1
	}
	e.uint(lastFlag)
	e.int(next)
	e.b = append(e.b, list.b...)
	return nil
}

// read answers up to n bytes at off; fewer mean the end of the file.
func (s *server) read(root int, r *request, e *encoder) error {
	if r.n < 0 || r.n > maxRead || r.off < 0 {
		return unix.EINVAL
	}
	f, err := s.files.get(r.volume, r.path, root)
	if err != nil {
		return err
	}
	defer s.files.put(f)
	e.uint(0) // these are not zeroes
	start := len(e.b)
	e.b = append(e.b, make([]byte, r.n)...)
	done := 0
	for done < int(r.n) {
		n, err := unix.Pread(f.fd, e.b[start+done:], r.off+int64(done))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		done += n
	}
	e.b = e.b[:start+done]
	if data := e.b[start:]; len(data) > 0 && len(bytes.TrimLeft(data, "\x00")) == 0 {
		e.b = e.b[:start-1] // a hole costs nothing to pass on
		e.uint(uint64(done))
	}
	return nil
}

// xattrs answers all names and values. Calls that take descriptors follow nothing, but need one that is open for reading,
// which devices and links can't be: so they go by the name in the parent.
func xattrs(root int, r *request, e *encoder) error {
	fd, name, done, err := parent(root, r.path)
	if err != nil {
		return err
	}
	defer done()
	path := fmt.Sprintf("/proc/self/fd/%d/%s", fd, name)
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return err
	}
	value := make([]byte, 64<<10) // the most that Linux has: XATTR_SIZE_MAX
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(path, name, value)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // ntfs3 and others name what is not set
		}
		if err != nil {
			return err
		}
		e.string(name)
		e.string(string(value[:n]))
		if len(e.b) > maxFrame-1024 {
			return unix.E2BIG
		}
	}
	return nil
}

// fileCache keeps some files open: most reads go on where another ended.
type fileCache struct {
	mu   sync.Mutex
	open map[fileKey]*cachedFile
	tick uint64
}

type fileKey struct{ volume, path string }

type cachedFile struct {
	key     fileKey
	fd      int
	users   int
	used    uint64
	seeking sync.Mutex
}

const keptFiles = 128

func (c *fileCache) get(volume, path string, root int) (*cachedFile, error) {
	key := fileKey{volume, path}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tick++
	f := c.open[key]
	if f == nil {
		// What is no regular file is never opened: a device would be the appliance's.
		fd, name, done, err := parent(root, path)
		if err != nil {
			return nil, err
		}
		a, err := lstat(fd, name)
		done()
		if err != nil {
			return nil, err
		}
		if a.Mode&unix.S_IFMT != unix.S_IFREG {
			return nil, unix.EINVAL
		}
		opened, err := open(root, path, unix.O_RDONLY|unix.O_NOATIME)
		if err != nil {
			return nil, err
		}
		f = &cachedFile{key: key, fd: opened}
		c.open[key] = f
	}
	f.users++
	f.used = c.tick
	c.evict()
	return f, nil
}

func (c *fileCache) put(f *cachedFile) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.users--
	c.evict()
}

// evict closes the file that was not used for the longest time, if there are too many.
func (c *fileCache) evict() {
	for len(c.open) > keptFiles {
		var oldest *cachedFile
		for _, f := range c.open {
			if f.users == 0 && (oldest == nil || f.used < oldest.used) {
				oldest = f
			}
		}
		if oldest == nil {
			return
		}
		_ = unix.Close(oldest.fd)
		delete(c.open, oldest.key)
	}
}
