package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Dir keeps objects as files below a folder of a local (or network) file
// system. Files are 0600 and folders 0700. Files and folders whose names begin with
// a dot are not objects.
type Dir struct {
	path string

	mu      sync.Mutex
	durable map[string]struct{} // folders whose entry in their parent was synced; grows with the number of folders
	named   bool                // O_TMPFILE is not supported here

	watch func(Step) error // nil outside tests
}

var (
	_ Store  = (*Dir)(nil)
	_ Locker = (*Dir)(nil)
)

// OpenDir opens a folder that exists. The error wraps ErrNotFound if it does not.
func OpenDir(path string) (*Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	st, err := os.Stat(abs)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", sentinel(err))
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("open store: %s: %w", abs, unix.ENOTDIR)
	}
	return &Dir{path: abs, durable: map[string]struct{}{abs: {}}}, nil
}

// CreateDir makes the folder, and its parents, where they are missing, and opens
// it. That the folder exists already, empty or not, is no error.
func CreateDir(path string) (*Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("create store: %w", err)
	}
	// Find the nearest parent that exists, so that each new entry below it is
	// made durable.
	top := abs
	for top != "/" {
		if _, err := os.Stat(top); err == nil {
			break
		}
		top = filepath.Dir(top)
	}
	d := &Dir{path: abs, durable: map[string]struct{}{top: {}}}
	if err := d.makeFolder(abs); err != nil {
		return nil, fmt.Errorf("create store: %w", err)
	}
	return OpenDir(abs)
}

// Path returns the absolute path of the folder.
func (d *Dir) Path() string { return d.path }

// Close does nothing: a Dir holds no descriptors between calls.
func (d *Dir) Close() error { return nil }

func (d *Dir) file(name string) (string, error) {
	if !ValidName(name) {
		return "", fmt.Errorf("%w: %q", ErrName, name)
	}
	return d.path + "/" + name, nil
}

// sentinel adds this package's errors to those of the system.
func sentinel(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w (%w)", ErrNotFound, err)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%w (%w)", ErrExists, err)
	}
	return err
}

// Put implements [Store]. The order is: file synced, file linked, folder
// synced. An unnamed file vanishes with its last descriptor, so a crash leaves
// nothing.
func (d *Dir) Put(ctx context.Context, name string, r io.Reader, size int64) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("put %s: %w", name, err)
		}
	}()
	to, err := d.file(name)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("negative size %d", size)
	}
	// Not the guard, that is the link below: it only saves writing in vain.
	if _, err := os.Lstat(to); err == nil {
		return ErrExists
	}
	folder := filepath.Dir(to)
	if err := d.makeFolder(folder); err != nil {
		return err
	}
	t, err := d.newTemp(folder)
	if err != nil {
		return err
	}
	defer t.discard()

	if err := copyExactly(ctx, steppedWriter{d, t.f.Name(), t.f}, r, size); err != nil {
		return err
	}
	if err := d.step(StepSync, t.f.Name()); err != nil {
		return err
	}
	if err := t.f.Sync(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := t.link(to); err != nil {
		return sentinel(err)
	}
	if err := d.syncFolder(folder); err != nil {
		// Not durable, so it must not be seen as if it were.
		return errors.Join(err, d.step(StepUnlink, to), os.Remove(to))
	}
	return nil
}

// copyExactly copies size bytes and makes sure that r ends there.
func copyExactly(ctx context.Context, w io.Writer, r io.Reader, size int64) error {
	r = &ctxReader{ctx, r}
	buf := make([]byte, max(1, min(size, 256<<10)))
	n, err := io.CopyBuffer(w, io.LimitReader(r, size), buf)
	if err != nil {
		return err
	}
	if n < size {
		return fmt.Errorf("%d bytes of %d: %w", n, size, io.ErrUnexpectedEOF)
	}
	var more [1]byte
	switch _, err := io.ReadFull(r, more[:]); {
	case err == nil:
		return fmt.Errorf("more than the %d bytes announced", size)
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// makeFolder makes folder and its parents and syncs every entry on the way that
// this Dir has not synced before. That it exists says nothing: another process
// may have made it a moment ago and not have synced it yet.
func (d *Dir) makeFolder(folder string) error {
	d.mu.Lock()
	_, known := d.durable[folder]
	d.mu.Unlock()
	if known {
		return nil
	}
	parent := filepath.Dir(folder)
	if parent == folder {
		return nil
	}
	if err := d.makeFolder(parent); err != nil {
		return err
	}
	if err := d.step(StepMkdir, folder); err != nil {
		return err
	}
	if err := os.Mkdir(folder, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := d.syncFolder(parent); err != nil {
		return err
	}
	d.mu.Lock()
	d.durable[folder] = struct{}{}
	d.mu.Unlock()
	return nil
}

func (d *Dir) syncFolder(folder string) error {
	if err := d.step(StepSyncDir, folder); err != nil {
		return err
	}
	f, err := os.Open(folder)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Get implements [Store].
func (d *Dir) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error) {
	f, err := d.open(ctx, name, off)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	if n < 0 {
		n = 1<<63 - 1 - off
	}
	return &rangeReader{ctxReader{ctx, io.NewSectionReader(f, off, n)}, f}, nil
}

type rangeReader struct {
	ctxReader
	io.Closer
}

func (d *Dir) open(ctx context.Context, name string, off int64) (*os.File, error) {
	p, err := d.file(name)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if off < 0 {
		return nil, fmt.Errorf("negative offset %d", off)
	}
	f, err := os.Open(p)
	if err != nil {
		return nil, sentinel(err)
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		if err == nil {
			err = fmt.Errorf("%w: not a file", ErrNotFound)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// ReadAt implements [Store]. It is the hot path of every restore, so it goes
// around os.File, which would try to put the descriptor into the poller.
func (d *Dir) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	n, err := d.readAt(ctx, name, p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("read %s: %w", name, err)
	}
	return n, err
}

func (d *Dir) readAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("negative offset %d", off)
	}
	fd, err := d.openFD(ctx, name)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }() // read only: nothing to lose
	return preadFull(fd, p, off)
}

// openFD opens an object for reading, past os.File.
func (d *Dir) openFD(ctx context.Context, name string) (int, error) {
	file, err := d.file(name)
	if err != nil {
		return -1, err
	}
	if err := ctx.Err(); err != nil {
		return -1, err
	}
	fd, err := again(func() (int, error) { return unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return -1, sentinel(err)
	}
	return fd, nil
}

// preadFull fills p from offset off of a file, or says io.EOF.
func preadFull(fd int, p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := again(func() (int, error) { return unix.Pread(fd, p[done:], off+int64(done)) })
		switch {
		case errors.Is(err, unix.EISDIR):
			return 0, fmt.Errorf("%w: not a file", ErrNotFound)
		case err != nil:
			return done, err
		case n == 0:
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

// again repeats f while a signal interrupts it.
func again(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); err != unix.EINTR { //nolint:errorlint // a bare errno
			return n, err
		}
	}
}

// Stat implements [Store].
func (d *Dir) Stat(ctx context.Context, name string) (Info, error) {
	p, err := d.file(name)
	if err != nil {
		return Info{}, fmt.Errorf("stat: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return Info{}, err
	}
	st, err := os.Stat(p)
	if err != nil {
		return Info{}, fmt.Errorf("stat %s: %w", name, sentinel(err))
	}
	if !st.Mode().IsRegular() {
		return Info{}, fmt.Errorf("stat %s: %w: not a file", name, ErrNotFound)
	}
	return Info{Name: name, Size: st.Size()}, nil
}

// Delete implements [Store].
func (d *Dir) Delete(ctx context.Context, name string) error {
	p, err := d.file(name)
	if err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.step(StepUnlink, p); err != nil {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	// unlink, not os.Remove: that would also take an empty folder.
	if err := unix.Unlink(p); err != nil {
		if errors.Is(err, unix.EISDIR) {
			err = ErrNotFound
		}
		return fmt.Errorf("delete %s: %w", name, sentinel(err))
	}
	if err := d.syncFolder(filepath.Dir(p)); err != nil {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}

// List implements [Store]. It holds the entries of one folder per level in memory.
func (d *Dir) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		// Start at the deepest folder that the prefix names.
		folder := ""
		if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
			folder = prefix[:i+1]
		}
		if folder != "" && !ValidName(strings.TrimSuffix(folder, "/")) {
			return // nothing can be named so
		}
		d.walk(ctx, folder, prefix, yield)
	}
}

// walk yields what lies in folder ("" or ending in "/"). It returns false if the
// caller wants no more.
func (d *Dir) walk(ctx context.Context, folder, prefix string, yield func(Info, error) bool) bool {
	if err := ctx.Err(); err != nil {
		yield(Info{}, err)
		return false
	}
	entries, err := d.entries(folder)
	if err != nil {
		yield(Info{}, fmt.Errorf("list %s: %w", prefix, err))
		return false
	}
	for _, e := range entries {
		name := folder + e.key
		if e.folder {
			if (strings.HasPrefix(name, prefix) || strings.HasPrefix(prefix, name)) &&
				!d.walk(ctx, name, prefix, yield) {
				return false
			}
			continue
		}
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		st, err := os.Stat(path.Join(d.path, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted since
		}
		if err != nil {
			yield(Info{}, fmt.Errorf("list %s: %w", prefix, err))
			return false
		}
		if st.Mode().IsRegular() && !yield(Info{Name: name, Size: st.Size()}, nil) {
			return false
		}
	}
	return true
}

type entry struct {
	key    string // file name; a folder's ends in "/", so that the order is that of whole names
	folder bool
}

func (d *Dir) entries(folder string) ([]entry, error) {
	des, err := os.ReadDir(path.Join(d.path, folder))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := make([]entry, 0, len(des))
	for _, de := range des {
		if !ValidName(de.Name()) {
			continue
		}
		e := entry{key: de.Name(), folder: de.IsDir()}
		if e.folder {
			e.key += "/"
		}
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b entry) int { return strings.Compare(a.key, b.key) })
	return out, nil
}

// ListDirs implements [Store].
func (d *Dir) ListDirs(ctx context.Context, prefix string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if prefix != "" && (!strings.HasSuffix(prefix, "/") || !ValidName(strings.TrimSuffix(prefix, "/"))) {
		return nil, fmt.Errorf("list %q: %w", prefix, ErrName)
	}
	entries, err := d.entries(prefix)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", prefix, err)
	}
	var dirs []string
	for _, e := range entries {
		if e.folder {
			dirs = append(dirs, strings.TrimSuffix(e.key, "/"))
		}
	}
	slices.Sort(dirs)
	return dirs, nil
}
