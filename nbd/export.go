package nbd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/tidemark/tidemark/restore"
)

// maxString is the longest string of the protocol in bytes, section
// "Conventions".
const maxString = 4096

// ErrUnknownExport is wrapped when there is no export of a name, or none that the
// client may know of.
var ErrUnknownExport = errors.New("unknown export")

// ErrExportName is wrapped when a name or description is not allowed on the
// wire, or is taken.
var ErrExportName = errors.New("bad export name")

// Export is a disk under a name.
type Export struct {
	Name        string // UTF-8 without NUL, at most 4096 bytes; may be empty
	Description string // for people; as Name

	// Disk is what is served. It can be written if it is a
	// [restore.WritableDisk] and ReadOnly is false. Many connections use it
	// at the same time.
	Disk     restore.Disk
	ReadOnly bool

	// Moving tells that the name may lead to another disk when it is opened
	// again, as "latest" does. Clients are told to use one connection then.
	Moving bool

	// History, unless nil, leads to older states of Disk. What differs from
	// one of them is the metadata context qemu:dirty-bitmap:NAME, if Disk is a
	// [restore.Differ].
	History History

	// Release, unless nil, is called once for every successful Open, after
	// the last use of Disk.
	Release func()
}

// writable returns the disk to write to, or nil.
func (e *Export) writable() restore.WritableDisk {
	w, ok := e.Disk.(restore.WritableDisk)
	if !ok || e.ReadOnly {
		return nil
	}
	return w
}

func (e *Export) release() {
	if e.Release != nil {
		e.Release()
	}
}

// Listing is what a client sees of an export before it opens it.
type Listing struct {
	Name        string
	Description string
}

// Exports finds exports. It is used by many connections at once. What it knows
// of the client is what has been proven by then: before TLS less than after.
type Exports interface {
	// Open finds the export of exactly this name. Its error wraps
	// [ErrUnknownExport] if there is none, and just so if this client must not
	// know that there is one. All exports given out for one name at one time
	// must share their writes and Sync: the server tells clients that they
	// may use several connections.
	Open(ctx context.Context, client Client, name string) (Export, error)

	// List names all exports that this client may know of.
	List(ctx context.Context, client Client) ([]Listing, error)
}

// ErrUnknownPast is wrapped when a [History] has no state of a name.
var ErrUnknownPast = errors.New("unknown state of the disk")

// History finds older states of a disk by name, UTF-8 without NUL. Many connections
// may use one at the same time, until the export is released.
type History interface {
	// List names those that clients are shown, a thousand or so at most.
	List(ctx context.Context) ([]string, error)

	// Open opens the one of this name, listed or not; the error wraps
	// [ErrUnknownPast] if there is none. release is called once, after the last
	// use of the disk.
	Open(ctx context.Context, name string) (d restore.Disk, release func(), err error)
}

// FastZeroer is implemented by writable disks that know when Zero is faster
// than writing. Without it a client's "fast zero" is refused, unless the range
// is zero already.
type FastZeroer interface {
	// ZeroIsFast tells whether Zero of [off, off+n) takes less time than
	// writing as many bytes. It must not block.
	ZeroIsFast(off, n int64) bool
}

// Static is a fixed set of exports, open to every client.
type Static struct {
	byName map[string]Export
	names  []string // in the order given
}

var _ Exports = (*Static)(nil)

// NewStatic makes a set of exports. Its error wraps [ErrExportName].
func NewStatic(exports ...Export) (*Static, error) {
	s := &Static{byName: make(map[string]Export, len(exports))}
	for _, e := range exports {
		for _, text := range []string{e.Name, e.Description} {
			if !validString(text) {
				return nil, fmt.Errorf("%w: %.64q: not UTF-8, has NUL, or is over %d bytes", ErrExportName, text, maxString)
			}
		}
		if _, taken := s.byName[e.Name]; taken {
			return nil, fmt.Errorf("%w: %q is there twice", ErrExportName, e.Name)
		}
		if e.Disk == nil {
			return nil, fmt.Errorf("%w: %q has no disk", ErrExportName, e.Name)
		}
		s.byName[e.Name] = e
		s.names = append(s.names, e.Name)
	}
	return s, nil
}

// Open implements [Exports].
func (s *Static) Open(_ context.Context, _ Client, name string) (Export, error) {
	e, ok := s.byName[name]
	if !ok {
		return Export{}, fmt.Errorf("%w %q", ErrUnknownExport, name)
	}
	return e, nil
}

// List implements [Exports].
func (s *Static) List(context.Context, Client) ([]Listing, error) {
	list := make([]Listing, 0, len(s.names))
	for _, name := range s.names {
		list = append(list, Listing{Name: name, Description: s.byName[name].Description})
	}
	return list, nil
}

// open finds an export, and the only one that the client can see under the name
// "" too: section "Option types", the default export.
func open(ctx context.Context, from Exports, client Client, name string) (Export, error) {
	e, err := from.Open(ctx, client, name)
	if err == nil || name != "" || !errors.Is(err, ErrUnknownExport) {
		return e, err
	}
	list, listErr := from.List(ctx, client)
	if listErr != nil {
		return Export{}, listErr
	}
	if len(list) != 1 {
		return Export{}, err
	}
	return from.Open(ctx, client, list[0].Name)
}

func validString(s string) bool {
	return len(s) <= maxString && utf8.ValidString(s) && !strings.Contains(s, "\x00")
}
