package appliance

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/tidemark/tidemark/guestfs"
)

// The protocol: frames of length (4 bytes, little endian, of what follows), ID of the request (8 bytes), and a body. Every request
// is answered by one frame of the same ID, in any order. The first frame, of ID 0, comes from the appliance when it is ready.
// Numbers in bodies are uvarints, strings have their length before them.

// version names the protocol: both ends are the same binary, this finds a wrong initramfs.
const version = "tidemark-files-1"

// Limits of what one side takes from the other, in bytes.
const (
	maxRead  = 512 << 10 // of one read
	maxFrame = 1 << 20
	maxName  = 4096 // no file system of Linux has names of over 1024 bytes
)

// errWire is wrapped when the other side breaks the protocol.
var errWire = errors.New("appliance speaks nonsense")

type op byte

const (
	opVolumes op = iota + 1
	opMount
	opLstat
	opReadDir
	opRead
	opReadlink
	opXattrs
	opSeekData
	opSeekHole
)

// request is the body of every request.
type request struct {
	op     op
	volume string
	path   string
	off    int64 // of opRead and opSeek*; cookie of opReadDir
	n      int64 // of opRead
}

// Classes of failure in answers.
const (
	failErrno = iota // of a system call on a path
	failMount
	failKey
	failNoFiles
	failNoVolume
)

// encoder appends to a body.
type encoder struct{ b []byte }

func (e *encoder) uint(v uint64)   { e.b = binary.AppendUvarint(e.b, v) }
func (e *encoder) int(v int64)     { e.uint(uint64(v)) }
func (e *encoder) string(s string) { e.uint(uint64(len(s))); e.b = append(e.b, s...) }
func (e *encoder) time(t time.Time) {
	e.int(t.Unix())
	e.uint(uint64(t.Nanosecond()))
}

// decoder takes a body apart. After the first error all is zero.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s", errWire, what)
	}
	d.b = nil
}

func (d *decoder) uint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail("number")
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) int() int64 { return int64(d.uint()) }

func (d *decoder) uint32() uint32 {
	v := d.uint()
	if v > 1<<32-1 {
		d.fail("number over 32 bits")
		return 0
	}
	return uint32(v)
}

func (d *decoder) bytes() []byte {
	n := d.uint()
	if n > uint64(len(d.b)) {
		d.fail("length")
		return nil
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) string() string { return string(d.bytes()) }

func (d *decoder) time() time.Time {
	sec, nsec := d.int(), d.uint()
	if nsec >= 1e9 {
		d.fail("nanoseconds")
		return time.Time{}
	}
	return time.Unix(sec, int64(nsec))
}

// end is the error, also if something is left.
func (d *decoder) end() error {
	if d.err == nil && len(d.b) > 0 {
		d.fail("more than expected")
	}
	return d.err
}

func (r *request) encode() []byte {
	e := encoder{b: []byte{byte(r.op)}}
	e.string(r.volume)
	e.string(r.path)
	e.int(r.off)
	e.int(r.n)
	return e.b
}

func decodeRequest(b []byte) (request, error) {
	if len(b) == 0 {
		return request{}, fmt.Errorf("%w: empty", errWire)
	}
	d := decoder{b: b[1:]}
	r := request{op: op(b[0]), volume: d.string(), path: d.string(), off: d.int(), n: d.int()}
	return r, d.end()
}

func (e *encoder) attr(a guestfs.Attr) {
	for _, v := range []uint64{
		a.Dev, a.Ino, uint64(a.Mode), uint64(a.Nlink), uint64(a.UID), uint64(a.GID), a.Rdev,
		uint64(a.Size), uint64(a.Blocks), uint64(a.Blksize),
	} {
		e.uint(v)
	}
	e.time(a.Atime)
	e.time(a.Mtime)
	e.time(a.Ctime)
}

func (d *decoder) attr() guestfs.Attr {
	a := guestfs.Attr{
		Dev: d.uint(), Ino: d.uint(), Mode: d.uint32(), Nlink: d.uint32(), UID: d.uint32(), GID: d.uint32(), Rdev: d.uint(),
		Size: d.int(), Blocks: d.int(), Blksize: d.uint32(), Atime: d.time(), Mtime: d.time(), Ctime: d.time(),
	}
	if a.Size < 0 || a.Blocks < 0 {
		d.fail("negative size")
	}
	if d.err == nil && !validType(a.Mode) {
		d.fail("type of file")
	}
	return a
}

func validType(mode uint32) bool {
	switch mode & syscall.S_IFMT {
	case syscall.S_IFREG, syscall.S_IFDIR, syscall.S_IFLNK, syscall.S_IFCHR, syscall.S_IFBLK, syscall.S_IFIFO, syscall.S_IFSOCK:
		return true
	}
	return false
}

// dirPage is a part of a directory.
type dirPage struct {
	entries []guestfs.DirEntry
	next    int64 // cookie of the part behind
	last    bool
}

func (e *encoder) entry(x guestfs.DirEntry) {
	e.string(x.Name)
	var errno syscall.Errno
	errors.As(x.Err, &errno)
	e.uint(uint64(errno))
	e.attr(x.Attr)
}

func decodeDirPage(b []byte) (p dirPage, err error) {
	d := decoder{b: b}
	p.last = d.uint() != 0
	p.next = d.int()
	for len(d.b) > 0 {
		x := guestfs.DirEntry{Name: d.string()}
		errno := d.uint32()
		x.Attr = d.attr()
		if d.err == nil && !validName(x.Name) {
			d.fail("name")
		}
		if errno != 0 {
			x.Err = syscall.Errno(errno)
		}
		p.entries = append(p.entries, x)
	}
	if d.err == nil && len(p.entries) == 0 && !p.last {
		d.fail("empty part of a directory")
	}
	return p, d.err
}

// validName tells whether a name can be an entry's: what the appliance says may be a guest's.
func validName(s string) bool {
	return s != "" && s != "." && s != ".." && len(s) <= maxName && !strings.ContainsAny(s, "/\x00")
}

func (e *encoder) volume(v guestfs.Volume) {
	for _, s := range []string{v.Name, v.Kind, v.State, v.Label, v.UUID, v.Why} {
		e.string(s)
	}
	e.int(v.Size)
}

func decodeVolumes(b []byte) (vs []guestfs.Volume, err error) {
	d := decoder{b: b}
	seen := map[string]bool{}
	for len(d.b) > 0 {
		v := guestfs.Volume{Name: d.string(), Kind: d.string(), State: d.string(), Label: d.string(), UUID: d.string(), Why: d.string(), Size: d.int()}
		if d.err == nil && (!validName(v.Name) || len(v.Name) > 255 || seen[v.Name]) {
			d.fail("name of a volume")
		}
		seen[v.Name] = true
		vs = append(vs, v)
	}
	return vs, d.err
}

// decodeRead fills p with what was read: so many zeroes, or if that is 0, data.
func decodeRead(b, p []byte) (int, error) {
	d := decoder{b: b}
	zeroes := d.uint()
	if d.err == nil && (zeroes > uint64(len(p)) || len(d.b) > len(p) || zeroes > 0 && len(d.b) > 0) {
		d.fail("more than was asked for")
	}
	if d.err != nil {
		return 0, d.err
	}
	if zeroes > 0 {
		clear(p[:zeroes])
		return int(zeroes), nil
	}
	return copy(p, d.b), nil
}

func decodeXattrs(b []byte) (map[string][]byte, error) {
	d := decoder{b: b}
	m := map[string][]byte{}
	for len(d.b) > 0 {
		name := d.string()
		if d.err == nil && (name == "" || len(name) > 255 || strings.ContainsRune(name, 0)) {
			d.fail("name of an attribute")
		}
		m[name] = append([]byte{}, d.bytes()...)
	}
	return m, d.err
}

// fail is the body of an answer that is an error.
func fail(class int, errno syscall.Errno, reason string) []byte {
	e := encoder{b: []byte{1}}
	e.uint(uint64(class))
	e.uint(uint64(errno))
	e.string(reason)
	return e.b
}

// answer is what a body of an answer holds, or the error it is.
func answer(b []byte, r *request) ([]byte, error) {
	if len(b) == 0 {
		return nil, fmt.Errorf("%w: empty", errWire)
	}
	if b[0] == 0 {
		return b[1:], nil
	}
	d := decoder{b: b[1:]}
	class, errno, reason := d.uint(), d.uint32(), strings.ToValidUTF8(d.string(), "?")
	if err := d.end(); err != nil {
		return nil, err
	}
	volume := func(err error) error { return &guestfs.VolumeError{Volume: r.volume, Err: err, Reason: reason} }
	switch {
	case class == failMount:
		return nil, volume(guestfs.ErrMount)
	case class == failKey:
		return nil, volume(guestfs.ErrKey)
	case class == failNoFiles:
		return nil, volume(guestfs.ErrNoFiles)
	case class == failNoVolume:
		return nil, volume(guestfs.ErrNoVolume)
	case errno == 0 || errno > 4095:
		return nil, fmt.Errorf("%w: error %d", errWire, errno)
	}
	return nil, fmt.Errorf("%s: %q: %w", r.volume, r.path, syscall.Errno(errno))
}

// writeFrame writes one frame with one call.
func writeFrame(w io.Writer, id uint64, body []byte) error {
	b := make([]byte, 12, 12+len(body))
	binary.LittleEndian.PutUint32(b, uint32(8+len(body)))
	binary.LittleEndian.PutUint64(b[4:], id)
	_, err := w.Write(append(b, body...))
	return err
}

func readFrame(r io.Reader) (id uint64, body []byte, err error) {
	var head [12]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n < 8 || n > maxFrame {
		return 0, nil, fmt.Errorf("%w: frame of %d bytes", errWire, n)
	}
	body = make([]byte, n-8)
	_, err = io.ReadFull(r, body)
	return binary.LittleEndian.Uint64(head[4:]), body, err
}
