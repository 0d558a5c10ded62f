package blob

import (
	"context"
	"errors"
	"io"
	"iter"
)

// ErrNotFound is wrapped when there is no object of that name.
var ErrNotFound = errors.New("not found")

// ErrExists is wrapped by Put when the name is taken.
var ErrExists = errors.New("exists already")

// ErrLocked is wrapped by Lock when somebody else holds the lock.
var ErrLocked = errors.New("locked by another process")

// ErrName is wrapped when a name breaks the rules of [ValidName].
var ErrName = errors.New("invalid object name")

// Info describes an object.
type Info struct {
	Name string
	Size int64 // bytes
}

// Store holds immutable objects by name.
//
// Names follow [ValidName]; every method but List and ListDirs answers an
// invalid one with ErrName. No name may be the folder of another
// ("a" beside "a/b"): what a backend does then is an error of its choice.
// All methods are safe for concurrent use, also by several processes.
// A cancelled context ends a call with the context's error as soon as the
// backend can.
type Store interface {
	// Put creates the object name from exactly size bytes of r.
	//
	// It is atomic: no reader ever sees a part of it, whatever happens. It
	// is durable when Put returns nil: it outlives power loss. If the name is
	// taken nothing changes and the error wraps ErrExists; of several
	// concurrent Puts of one name exactly one succeeds. If r ends early or
	// holds more than size bytes, or fails, nothing is created. After any other
	// error the object is absent as far as the backend can tell.
	Put(ctx context.Context, name string, r io.Reader, size int64) error

	// Get reads n bytes from off, or to the end of the object if n < 0. A range
	// that reaches past the end is cut there. The caller closes the reader.
	// The error wraps ErrNotFound if there is no such object.
	Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error)

	// ReadAt fills p from offset off, as [io.ReaderAt] does: fewer bytes than
	// len(p) come with io.EOF. The error wraps ErrNotFound if there is no such
	// object.
	ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error)

	// Stat tells an object's size. The error wraps ErrNotFound if there is no
	// such object.
	Stat(ctx context.Context, name string) (Info, error)

	// List yields the objects whose names begin with prefix, in ascending byte
	// order of the whole name. The prefix may end anywhere in a name. Objects
	// put or deleted meanwhile may or may not be seen; all others are. After
	// a non-nil error nothing follows.
	List(ctx context.Context, prefix string) iter.Seq2[Info, error]

	// ListDirs returns the names of the folders one level below prefix, which is
	// "" or ends in "/": for "a/" and objects "a/b/c", "a/d/e/f" and "a/g" it is
	// {"b", "d"}. Ascending, without slashes. A backend may list a folder
	// whose last object is gone.
	ListDirs(ctx context.Context, prefix string) ([]string, error)

	// Delete removes the object. The error wraps ErrNotFound if there is none.
	Delete(ctx context.Context, name string) error

	// Close gives back what the Store holds. No other call may follow or run.
	Close() error
}

// Locker is implemented by stores that can lock a name for one writer.
type Locker interface {
	// Lock takes the lock of name without waiting; the error wraps ErrLocked if
	// it is held, by this process or another. Names of locks are apart from
	// names of objects, and follow the same rules. The lock ends with unlock or
	// with the process, however that dies. unlock may be called once.
	Lock(ctx context.Context, name string) (unlock func() error, err error)
}

// ValidName tells whether name may name an object: 1 to 1000 bytes, parts of 1
// to 200 bytes joined by "/", each made of A-Z a-z 0-9 and ._-+=@: and not
// beginning with a dot. So it can neither leave the store's folder nor meet a
// backend's own hidden files.
func ValidName(name string) bool {
	if len(name) == 0 || len(name) > 1000 {
		return false
	}
	part := 0
	for i := range len(name) {
		c := name[i]
		switch {
		case c == '/':
			if part == 0 {
				return false
			}
			part = 0
			continue
		case c == '.' && part == 0:
			return false
		case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case c == '.', c == '_', c == '-', c == '+', c == '=', c == '@', c == ':':
		default:
			return false
		}
		if part++; part > 200 {
			return false
		}
	}
	return part > 0
}
