package nbd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
)

// serveDisk serves one disk and returns a client in the transmission phase.
func serveDisk(t testing.TB, d restore.Disk, structured bool) *peer {
	t.Helper()
	socket, _ := start(t, &Server{Exports: static(t, Export{Disk: d})})
	p := dial(t, "unix", socket)
	p.enter("", structured)
	return p
}

// serveAs is serveDisk with any form of headers and any contexts.
func serveAs(t testing.TB, d restore.Disk, h headers, contexts ...string) *peer {
	t.Helper()
	socket, _ := start(t, &Server{Exports: static(t, Export{Disk: d})})
	p := dial(t, "unix", socket)
	p.enterAs("", h, contexts...)
	return p
}

const diskSize = 8 << 20

func TestWhatIsWrittenIsRead(t *testing.T) {
	disks := map[string]func(t *testing.T) restore.WritableDisk{
		"memory":       func(*testing.T) restore.WritableDisk { return newMemDisk(diskSize) },
		"file":         func(t *testing.T) restore.WritableDisk { return newFileDisk(t, diskSize) },
		"hidden file":  func(t *testing.T) restore.WritableDisk { return plain{newFileDisk(t, diskSize)} },
		"always slow":  func(*testing.T) restore.WritableDisk { return slow(newMemDisk(diskSize)) },
		"odd sized":    func(*testing.T) restore.WritableDisk { return newMemDisk(diskSize - 511) },
		"overlay":      func(t *testing.T) restore.WritableDisk { return newOverlay(t, diskSize) },
		"file sharded": func(t *testing.T) restore.WritableDisk { return halfFile{newFileDisk(t, diskSize)} },
	}
	for _, network := range []string{"unix", "tcp"} {
		for name, make := range disks {
			for h, form := range []string{"simple", "structured", "extended"} {
				t.Run(network+"/"+name+"/"+form, func(t *testing.T) {
					t.Parallel()
					randomRequests(t, network, make(t), headers(h))
				})
			}
		}
	}
}

// slow makes every read look slow, so that all of them go to workers.
func slow(d restore.WritableDisk) restore.WritableDisk {
	return &hooked{WritableDisk: d, read: func(int64, int) error { time.Sleep(slowRead * 5 / 4); return nil }}
}

// halfFile says of every second MiB only that it lies in its file.
type halfFile struct{ *fileDisk }

func (h halfFile) File(off, n int64) (uintptr, bool) {
	fd, _ := h.fileDisk.File(off, n)
	return fd, off>>20%2 == 0 && off>>20 == (off+n-1)>>20
}

func randomRequests(t *testing.T, network string, d restore.WritableDisk, h headers) {
	s := &Server{Exports: static(t, Export{Disk: d}), Workers: 4}
	address := filepath.Join(t.TempDir(), "s")
	if network == "tcp" {
		address = "127.0.0.1:0"
	}
	l, err := Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	startListener(t, s, l)
	p := dial(t, network, l.Addr().String())
	p.enterAs("", h)
	randomRequestsTo(t, p, int(d.Size()), h.chunked())
}

// randomRequestsTo sends windows of requests of all kinds that do not overlap
// within a window, and compares with a model.
func randomRequestsTo(t *testing.T, p *peer, size int, structured bool) {
	rng := rand.New(rand.NewPCG(1, 2))
	model := make([]byte, size)
	const window = 8
	for range 60 {
		type sent struct {
			off, n int
			cmd    uint16
		}
		requests := make([]sent, window)
		var out []byte
		for i := range requests {
			lo, hi := i*size/window, (i+1)*size/window
			r := sent{cmd: []uint16{cmdRead, cmdRead, cmdWrite, cmdWrite, cmdWriteZeroes, cmdTrim, cmdCache, cmdFlush}[rng.IntN(8)]}
			r.off = lo + rng.IntN(hi-lo)
			r.n = rng.IntN([]int{1 << 9, 1 << 13, 1 << 18, 1 << 20}[rng.IntN(4)])
			if rng.IntN(2) == 0 {
				r.off, r.n = r.off&^4095, (r.n+4095)&^4095
			}
			r.off = max(r.off, lo)
			r.n = min(r.n, hi-r.off)
			if r.cmd == cmdFlush {
				r.off, r.n = 0, 0
			}
			var flags uint16
			if rng.IntN(4) == 0 {
				flags |= cmdFlagFUA
			}
			if r.cmd == cmdWriteZeroes && rng.IntN(2) == 0 {
				flags |= cmdFlagNoHole
			}
			if r.cmd == cmdRead && structured && rng.IntN(2) == 0 {
				flags |= cmdFlagDF
			}
			out = append(out, p.encode(flags, r.cmd, uint64(i), uint64(r.off), uint64(r.n))...)
			if r.cmd == cmdWrite {
				data := pattern(r.n, byte(rng.Uint32()))
				out = append(out, data...)
				copy(model[r.off:], data)
			}
			if r.cmd == cmdWriteZeroes || r.cmd == cmdTrim {
				clear(model[r.off : r.off+r.n])
			}
			requests[i] = r
		}
		go func() { _, _ = p.Write(out) }() // replies come meanwhile
		for range requests {
			i, a := p.next(func(i uint64) (uint64, int) {
				if requests[i].cmd == cmdRead {
					return uint64(requests[i].off), requests[i].n
				}
				return 0, 0
			})
			r := requests[i]
			if a.errno != 0 {
				t.Fatalf("%+v: %v", r, a.errno)
			}
			if r.cmd == cmdRead && !bytes.Equal(a.data, model[r.off:r.off+r.n]) {
				t.Fatalf("%+v: wrong data", r)
			}
		}
	}
}

// next reads whatever reply comes. Chunks of several replies may be mixed, so
// they are put together by handle here.
func (p *peer) next(want func(handle uint64) (off uint64, n int)) (uint64, answer) {
	p.t.Helper()
	if p.parts == nil {
		p.parts = map[uint64]*answer{}
	}
	for {
		head := p.get(16)
		handle := be64(head[8:])
		off, n := want(handle)
		if be32(head) == magicSimple && p.headers != extendedHeaders {
			a := answer{handle: handle, errno: Errno(be32(head[4:]))}
			if a.errno == 0 && n > 0 {
				if p.headers.chunked() {
					p.t.Fatal("a read was answered by a simple reply")
				}
				a.data = p.get(n)
			}
			return handle, a
		}
		flags, kind, body := p.getChunk(head)
		a := p.parts[handle]
		if a == nil {
			a = &answer{handle: handle, data: make([]byte, n)}
			p.parts[handle] = a
		}
		switch kind {
		case replyOffsetData:
			copy(a.data[be64(body)-off:], body[8:])
		case replyNone, replyOffsetHole:
		default:
			a.errno = Errno(be32(body))
		}
		if flags&replyFlagDone != 0 {
			delete(p.parts, handle)
			return handle, *a
		}
	}
}

func TestReadOnlyExportRefusesWritesAndGoesOn(t *testing.T) {
	forms(t, func(t *testing.T, h headers) {
		d := newMemDisk(diskSize)
		socket, _ := start(t, &Server{Exports: static(t, Export{Disk: d, ReadOnly: true})})
		p := dial(t, "unix", socket)
		p.enterAs("", h)
		p.request(0, cmdWrite, 1, 0, 300<<10, pattern(300<<10, 1)) // its payload must be skipped
		p.answer(0, 0).want(t, 1, EPERM)
		p.request(0, cmdWriteZeroes, 2, 0, 4096)
		p.answer(0, 0).want(t, 2, EPERM)
		p.request(0, cmdTrim, 3, 0, 4096) // was not advertised
		p.answer(0, 0).want(t, 3, EPERM)
		p.request(0, cmdFlush, 4, 0, 0)
		p.answer(0, 0).want(t, 4, 0)
		p.request(0, cmdRead, 5, 0, 4096)
		a := p.answer(0, 4096)
		a.want(t, 5, 0)
		if !bytes.Equal(a.data, make([]byte, 4096)) {
			t.Error("something was written")
		}
	})
}

func TestInvalidRequestsGetTheirErrors(t *testing.T) {
	forms(t, func(t *testing.T, h headers) {
		p := serveAs(t, newMemDisk(64<<20), h)
		size := uint64(64 << 20)
		for i, c := range []struct {
			flags, cmd uint16
			off        uint64
			length     uint32
			want       Errno
		}{
			{0, cmdRead, size, 1, EINVAL},
			{0, cmdRead, size - 1, 2, EINVAL},
			{0, cmdRead, math.MaxUint64, 1, EINVAL},
			{0, cmdRead, math.MaxUint64 - 1, 2, EINVAL},
			{0, cmdRead, 1 << 63, 0, EINVAL},
			{0, cmdRead, 0, maxPayload + 1, EINVAL},
			{cmdFlagReqOne, cmdRead, 0, 1, EINVAL},
			{1 << 15, cmdRead, 0, 1, EINVAL},
			{0, cmdWrite, size - 1, 2, ENOSPC},
			{0, cmdWrite, math.MaxUint64, 100, ENOSPC},
			{0, cmdWrite, 0, maxPayload + 1, EINVAL},
			{cmdFlagNoHole, cmdWrite, 0, 5, EINVAL},
			{0, cmdWriteZeroes, size - 1, 2, ENOSPC},
			{cmdFlagNoHole, cmdWriteZeroes, 0, maxPayload + 1, EINVAL},
			{cmdFlagDF, cmdWriteZeroes, 0, 1, EINVAL},
			{0, cmdTrim, size - 1, 2, EINVAL},
			{0, cmdCache, size - 1, 2, EINVAL},
			{0, cmdFlush, 1, 0, EINVAL},
			{0, cmdFlush, 0, 1, EINVAL},
			{0, cmdBlockStatus, 0, 0, EINVAL},
			{0, cmdBlockStatus, size - 1, 2, EINVAL},
			{0, 8, 0, 1, EINVAL},
			{0, math.MaxUint16, 0, math.MaxUint32, EINVAL},
			{0, cmdRead, size, 0, 0},
			{0, cmdWrite, size, 0, 0},
			{0, cmdTrim, 0, 0, 0},
			{0, cmdWriteZeroes, 0, 0, 0},
			{0, cmdTrim, 0, 64 << 20, 0},
			{0, cmdWriteZeroes, 0, 64 << 20, 0},
			{0, cmdCache, 0, 64 << 20, 0},
			{cmdFlagFUA, cmdRead, 0, 0, 0},
		} {
			var payload []byte
			if c.cmd == cmdWrite {
				payload = make([]byte, c.length)
			}
			if h == extendedHeaders && c.length > maxPayload {
				if c.cmd == cmdWrite {
					continue // ends the connection
				}
				if c.flags&cmdFlagNoHole != 0 {
					c.want = EOVERFLOW
				}
			}
			p.request(c.flags, c.cmd, uint64(i), c.off, c.length, payload)
			if a := p.answer(0, 0); a.handle != uint64(i) || a.errno != c.want {
				t.Errorf("%+v: got %v", c, a.errno)
			}
		}
	})
}

func TestDontFragmentNeedsStructuredReplies(t *testing.T) {
	p := serveDisk(t, newMemDisk(diskSize), false)
	p.request(cmdFlagDF, cmdRead, 1, 0, 1)
	p.getSimple(1).want(t, 1, EINVAL)
	p = serveDisk(t, newMemDisk(diskSize), true)
	p.request(cmdFlagDF, cmdRead, 1, 0, 1)
	p.getStructured(0, 1).want(t, 1, 0)
}

func TestBadRequestMagicEndsTheConnection(t *testing.T) {
	p := serveDisk(t, newMemDisk(diskSize), false)
	p.put(uint32(magicRequest+1), make([]byte, 24))
	p.wantClosed()
}

func TestDisconnectAnswersWhatIsOutstanding(t *testing.T) {
	gate := make(chan struct{})
	p := serveDisk(t, &hooked{WritableDisk: newMemDisk(diskSize), read: func(int64, int) error {
		<-gate
		return nil
	}}, true)
	p.request(0, cmdRead, 1, 0, 1<<20)
	p.request(0, cmdDisconnect, 2, 0, 0)
	close(gate)
	p.getStructured(0, 1<<20).want(t, 1, 0)
	p.wantClosed()
}

func TestDiskErrorsHaveNoSuccessBeforeThem(t *testing.T) {
	forms(t, func(t *testing.T, h headers) {
		broken := errors.New("cable is out")
		bad := true
		d := &hooked{WritableDisk: newMemDisk(diskSize), read: func(int64, int) error {
			if bad {
				return broken
			}
			return nil
		}}
		p := serveAs(t, d, h)
		for i, n := range []uint32{512, 64 << 10, 1 << 20, 3 << 20} { // inline and by workers
			if err := d.WritableDisk.(*memDisk).fill(0, int(n)); err != nil {
				t.Fatal(err)
			}
			p.request(0, cmdRead, uint64(i), 0, n)
			a := p.answer(0, 0)
			a.want(t, uint64(i), EIO)
			if strings.Contains(a.why, "cable") {
				t.Errorf("the client is told %q", a.why)
			}
		}
		bad = false
		p.request(0, cmdRead, 99, 0, 512)
		p.answer(0, 512).want(t, 99, 0)
	})
}

func (d *memDisk) fill(off int64, n int) error {
	_, err := d.WriteAt(pattern(n, 3), off)
	return err
}

func TestDiskErrorsAreMapped(t *testing.T) {
	var e error
	d := &hooked{WritableDisk: newMemDisk(diskSize), write: func(int64, int) error { return e }}
	p := serveDisk(t, d, false)
	for i, c := range []struct {
		err  error
		want Errno
	}{
		{errors.New("x"), EIO},
		{fmt.Errorf("x: %w", syscall.ENOSPC), ENOSPC},
		{&os.PathError{Op: "write", Path: "/p", Err: syscall.EDQUOT}, ENOSPC},
		{syscall.EFBIG, ENOSPC},
		{syscall.EROFS, EPERM},
		{os.ErrPermission, EPERM},
		{syscall.EIO, EIO},
		{context.Canceled, ESHUTDOWN},
		{io.ErrShortWrite, EIO},
	} {
		e = c.err
		p.request(0, cmdWrite, uint64(i), 0, 100<<10, make([]byte, 100<<10))
		if a := p.getSimple(0); a.errno != c.want {
			t.Errorf("%v became %v", c.err, a.errno)
		}
	}
}

func TestStructuredReadSendsHolesAsHoles(t *testing.T) {
	for name, d := range map[string]restore.WritableDisk{"memory": newMemDisk(diskSize), "file": newFileDisk(t, diskSize)} {
		t.Run(name, func(t *testing.T) {
			data := pattern(128<<10, 9)
			if _, err := d.WriteAt(data, 1<<20); err != nil {
				t.Fatal(err)
			}
			p := serveDisk(t, d, true)
			p.request(0, cmdRead, 1, 512<<10, 1<<20)
			a := p.getStructured(512<<10, 1<<20)
			a.want(t, 1, 0)
			want := make([]byte, 1<<20)
			copy(want[512<<10:], data)
			if !bytes.Equal(a.data, want) {
				t.Error("wrong data")
			}
			// A file's holes are not looked for: that may take longer than sending them.
			if want := map[string]int{"memory": 2}[name]; a.holes != want {
				t.Errorf("%d holes, want %d", a.holes, want)
			}
			p.request(cmdFlagDF, cmdRead, 2, 512<<10, 1<<20)
			a = p.getStructured(512<<10, 1<<20)
			if a.want(t, 2, 0); a.holes != 0 || !bytes.Equal(a.data, want) {
				t.Errorf("with DF: %d holes", a.holes)
			}
		})
	}
}

func TestReadsUpToTheLargest(t *testing.T) {
	forms(t, func(t *testing.T, h headers) {
		d := newMemDisk(maxPayload + 1)
		want := pattern(maxPayload+1, 1)
		if _, err := d.WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		p := serveAs(t, d, h)
		for i, c := range []struct{ off, n int }{{0, maxPayload}, {1, maxPayload}, {12345, 5 << 20}, {7, 1<<20 + 1}, {0, 64 << 10}, {1, 64<<10 - 1}} {
			p.request(0, cmdRead, uint64(i), uint64(c.off), uint32(c.n))
			a := p.answer(uint64(c.off), c.n)
			if a.want(t, uint64(i), 0); !bytes.Equal(a.data, want[c.off:c.off+c.n]) {
				t.Errorf("%+v: wrong data", c)
			}
		}
	})
}

func TestWritesUpToTheLargest(t *testing.T) {
	forms(t, func(t *testing.T, h headers) {
		for _, c := range []struct{ off, n int }{{0, maxPayload}, {1, maxPayload}, {12345, 5 << 20}, {1, 64 << 10}, {3, 64<<10 + 1}} {
			d := newMemDisk(maxPayload + 1)
			p := serveAs(t, d, h)
			data, want := pattern(c.n, 2), make([]byte, d.size)
			copy(want[c.off:], data)
			p.request(0, cmdWrite, 1, uint64(c.off), uint32(c.n), data)
			p.answer(0, 0).want(t, 1, 0)
			if content(t, d) != sha256.Sum256(want) {
				t.Errorf("%+v: wrong data", c)
			}
		}
	})
}

func TestReadWithManyHolesHasFewChunks(t *testing.T) {
	d := newMemDisk(32 << 20)
	for off := int64(0); off < d.size; off += 2 * memPage {
		if err := d.fill(off, memPage); err != nil {
			t.Fatal(err)
		}
	}
	p := serveDisk(t, d, true)
	p.request(0, cmdRead, 1, 0, 32<<20)
	a := p.getStructured(0, 32<<20)
	a.want(t, 1, 0)
	if a.chunks > maxChunks+32 {
		t.Errorf("%d chunks", a.chunks)
	}
	want := make([]byte, 32<<20)
	if _, err := d.ReadAt(want, 0); err != nil || !bytes.Equal(a.data, want) {
		t.Errorf("wrong data, %v", err)
	}
}

func TestFileThatShrinksUnderARead(t *testing.T) {
	forms(t, func(t *testing.T, h headers) {
		d := newFileDisk(t, diskSize)
		if _, err := d.WriteAt(pattern(diskSize, 5), 0); err != nil {
			t.Fatal(err)
		}
		if err := d.f.Truncate(100 << 10); err != nil {
			t.Fatal(err)
		}
		p := serveAs(t, d, h)
		if h == simpleHeaders {
			p.request(0, cmdRead, 1, 0, 1<<20)
			p.get(16) // a success, told too early: nothing but the end can follow
			if n, err := io.Copy(io.Discard, p); n >= 1<<20 {
				t.Errorf("%d bytes of data, %v", n, err)
			}
			return
		}
		p.request(cmdFlagDF, cmdRead, 1, 0, 1<<20)
		p.getStructured(0, 1<<20).want(t, 1, EIO)
		p.request(cmdFlagDF, cmdRead, 2, 0, 64<<10)
		p.getStructured(0, 64<<10).want(t, 2, 0)
	})
}

func TestBlockStatus(t *testing.T) {
	d := newMemDisk(64 << 20)
	for _, off := range []int64{1 << 20, 1<<20 + memPage, 5 << 20} {
		if err := d.fill(off, memPage); err != nil {
			t.Fatal(err)
		}
	}
	p := serveDisk(t, d, true)
	const hole = stateHole | stateZero
	for i, c := range []struct {
		flags  uint16
		off    uint64
		length uint32
		want   string
	}{
		{0, 0, 64 << 20, fmt.Sprint([][2]uint32{{1 << 20, hole}, {2 * memPage, 0}, {4<<20 - 2*memPage, hole}, {memPage, 0}, {59<<20 - memPage, hole}})},
		{cmdFlagReqOne, 0, 64 << 20, fmt.Sprint([][2]uint32{{1 << 20, hole}})},
		{cmdFlagReqOne, 1 << 20, 512, fmt.Sprint([][2]uint32{{512, 0}})},
		{0, 1<<20 - 1, 2, fmt.Sprint([][2]uint32{{1, hole}, {1, 0}})},
	} {
		p.request(c.flags, cmdBlockStatus, uint64(i), c.off, c.length)
		a := p.getStructured(0, 0)
		if a.want(t, uint64(i), 0); fmt.Sprint(a.status) != c.want {
			t.Errorf("%+v: %v", c, a.status)
		}
	}
}

func TestBlockStatusIsBounded(t *testing.T) {
	d := newMemDisk(int64(3*maxExtents) * memPage)
	for i := int64(0); i < 3*maxExtents; i += 2 {
		d.pages[i] = make([]byte, memPage)
	}
	p := serveDisk(t, d, true)
	p.request(0, cmdBlockStatus, 1, 0, uint32(d.size))
	if a := p.getStructured(0, 0); len(a.status) != maxExtents || a.errno != 0 {
		t.Errorf("%d extents, %v", len(a.status), a.errno)
	}
}

func TestFastZero(t *testing.T) {
	d := newMemDisk(diskSize) // does not know whether it is fast
	if err := d.fill(0, memPage); err != nil {
		t.Fatal(err)
	}
	p := serveDisk(t, d, false)
	p.request(cmdFlagFastZero, cmdWriteZeroes, 1, 0, memPage)
	p.getSimple(0).want(t, 1, ENOTSUP)
	p.request(cmdFlagFastZero, cmdWriteZeroes, 2, 1<<20, 1<<20) // zero already
	p.getSimple(0).want(t, 2, 0)
	p.request(cmdFlagFastZero|cmdFlagNoHole, cmdWriteZeroes, 3, 1<<20, 1<<20)
	p.getSimple(0).want(t, 3, ENOTSUP)
	p.request(0, cmdRead, 4, 0, 1)
	if a := p.getSimple(1); a.data[0] != pattern(1, 3)[0] {
		t.Error("the refused request changed the disk")
	}

	f := newFileDisk(t, diskSize) // knows that it is
	if _, err := f.WriteAt(pattern(memPage, 1), 0); err != nil {
		t.Fatal(err)
	}
	p = serveDisk(t, f, false)
	p.request(cmdFlagFastZero, cmdWriteZeroes, 1, 0, memPage)
	p.getSimple(0).want(t, 1, 0)
	p.request(0, cmdRead, 2, 0, memPage)
	if a := p.getSimple(memPage); !bytes.Equal(a.data, make([]byte, memPage)) {
		t.Error("not zero")
	}
}

func TestZeroesWithoutHolesAreProvisioned(t *testing.T) {
	d := newFileDisk(t, diskSize)
	p := serveDisk(t, d, false)
	p.request(cmdFlagNoHole, cmdWriteZeroes, 1, 4096, 1<<20)
	p.getSimple(0).want(t, 1, 0)
	var st syscall.Stat_t
	if err := syscall.Fstat(int(d.f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 < 1<<20 {
		t.Errorf("only %d bytes allocated", st.Blocks*512)
	}
	p.request(0, cmdTrim, 2, 0, diskSize)
	p.getSimple(0).want(t, 2, 0)
	if err := syscall.Fstat(int(d.f.Fd()), &st); err != nil || st.Blocks != 0 {
		t.Errorf("%d blocks left after trim, %v", st.Blocks, err)
	}
}

// journal records the order of a disk's operations and of the replies.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines, " ")
}

func TestFUAIsDurableBeforeTheReply(t *testing.T) {
	for _, c := range []struct {
		cmd  uint16
		want string
	}{{cmdWrite, "write sync reply"}, {cmdWriteZeroes, "zero sync reply"}, {cmdTrim, "sync reply"}} {
		var j journal
		d := &hooked{WritableDisk: newMemDisk(diskSize),
			write: func(int64, int) error { j.add("write"); return nil },
			zero:  func() error { j.add("zero"); return nil },
			sync:  func() error { time.Sleep(20 * time.Millisecond); j.add("sync"); return nil },
		}
		p := serveDisk(t, d, false)
		p.request(cmdFlagFUA, c.cmd, 1, 0, 4096)
		if c.cmd == cmdWrite {
			p.put(make([]byte, 4096))
		}
		p.getSimple(0).want(t, 1, 0)
		j.add("reply")
		if got := j.String(); got != c.want {
			t.Errorf("command %d: %s, want %s", c.cmd, got, c.want)
		}
	}
}

func TestFailedSyncIsTold(t *testing.T) {
	p := serveDisk(t, &hooked{WritableDisk: newMemDisk(diskSize), sync: func() error { return syscall.EIO }}, false)
	p.request(0, cmdFlush, 1, 0, 0)
	p.getSimple(0).want(t, 1, EIO)
	p.request(cmdFlagFUA, cmdWrite, 2, 0, 1, "x")
	p.getSimple(0).want(t, 2, EIO)
}

func TestFlushCoversWhatWasAnsweredOnAnyConnection(t *testing.T) {
	var done atomic.Int64 // zeroes and writes that returned
	var seen atomic.Int64 // how many there were when Sync began
	d := &hooked{WritableDisk: newMemDisk(diskSize)}
	d.sync = func() error { seen.Store(done.Load()); return nil }
	counted := &afterwards{d, func() { done.Add(1) }}
	socket, _ := start(t, &Server{Exports: static(t, Export{Disk: counted})})
	p, q := dial(t, "unix", socket), dial(t, "unix", socket)
	p.enter("", false)
	q.enter("", false)
	for i := range uint64(200) {
		from, cmd := p, uint16(cmdWriteZeroes) // executed by workers
		if i%2 == 0 {
			from = q
		}
		from.request(0, cmd, i, i*4096, 4096)
		from.getSimple(0).want(t, i, 0)
		p.request(0, cmdFlush, i, 0, 0)
		p.getSimple(0).want(t, i, 0)
		if n := seen.Load(); n != int64(i)+1 {
			t.Fatalf("flush %d covered %d requests", i, n)
		}
	}
}

// afterwards calls a function when a change has returned.
type afterwards struct {
	restore.WritableDisk
	then func()
}

func (a *afterwards) Zero(off, n int64) error {
	defer a.then()
	return a.WritableDisk.Zero(off, n)
}

func TestSlowReadDoesNotHoldUpOthers(t *testing.T) {
	gate := make(chan struct{})
	d := &hooked{WritableDisk: newMemDisk(diskSize), read: func(_ int64, n int) error {
		if n >= largeRead {
			<-gate
		}
		return nil
	}}
	p := serveDisk(t, d, false)
	p.request(0, cmdRead, 1, 0, largeRead)
	p.request(0, cmdRead, 2, 0, 512)
	p.request(0, cmdWrite, 3, 0, 3, "abc")
	p.getSimple(512).want(t, 2, 0)
	p.getSimple(0).want(t, 3, 0)
	close(gate)
	p.getSimple(largeRead).want(t, 1, 0)
}

func TestSmallReadsThatWereSlowGoToWorkers(t *testing.T) {
	var gated atomic.Bool
	gate := make(chan struct{})
	d := &hooked{WritableDisk: newMemDisk(diskSize), read: func(int64, int) error {
		if gated.Load() {
			<-gate
		} else {
			time.Sleep(20 * slowRead)
		}
		return nil
	}}
	p := serveDisk(t, d, false)
	p.request(0, cmdRead, 1, 0, 512) // is found to be slow
	p.getSimple(512).want(t, 1, 0)
	gated.Store(true)
	p.request(0, cmdRead, 2, 0, 512)
	p.request(0, cmdWrite, 3, 0, 3, "abc")
	p.getSimple(0).want(t, 3, 0)
	close(gate)
	p.getSimple(512).want(t, 2, 0)
}

func TestWorkersAreBounded(t *testing.T) {
	var running, most atomic.Int64
	gate := make(chan struct{})
	d := &hooked{WritableDisk: newMemDisk(diskSize), zero: func() error {
		most.Store(max(most.Load(), running.Add(1)))
		<-gate
		running.Add(-1)
		return nil
	}}
	socket, _ := start(t, &Server{Exports: static(t, Export{Disk: d}), Workers: 3})
	p := dial(t, "unix", socket)
	p.enter("", false)
	for i := range uint64(10) {
		p.request(0, cmdWriteZeroes, i, 0, 4096)
	}
	eventually(t, "three run", func() bool { return running.Load() == 3 })
	close(gate)
	for range 10 {
		p.getSimple(0)
	}
	if most.Load() != 3 {
		t.Errorf("%d ran at once", most.Load())
	}
}

func TestStalledClientHoldsUpNobodyAndIsCutOff(t *testing.T) {
	for name, d := range map[string]restore.Disk{"memory": newMemDisk(diskSize), "file": newFileDisk(t, diskSize)} {
		t.Run(name, func(t *testing.T) {
			if _, err := d.(restore.WritableDisk).WriteAt(pattern(diskSize, 1), 0); err != nil {
				t.Fatal(err)
			}
			s := &Server{Exports: static(t, Export{Disk: d}), WriteTimeout: 300 * time.Millisecond}
			socket, _ := start(t, s)
			stalled := dial(t, "unix", socket)
			stalled.enter("", false)
			for i := range uint64(20) {
				stalled.request(0, cmdRead, i, 0, 1<<20)
			}
			p := dial(t, "unix", socket)
			p.enter("", false)
			for i := range uint64(100) {
				p.request(0, cmdRead, i, 0, 4096)
				p.getSimple(4096).want(t, i, 0)
			}
			eventually(t, "only one connection is left", func() bool { return connections(s) == 1 })
		})
	}
}

func TestShutdownFinishesRequestsInProgress(t *testing.T) {
	entered, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	d := &hooked{WritableDisk: newMemDisk(diskSize), write: func(int64, int) error {
		once.Do(func() { close(entered); <-gate })
		return nil
	}}
	socket, stop := start(t, &Server{Exports: static(t, Export{Disk: d})})
	p := dial(t, "unix", socket)
	p.enter("", false)
	idle := dial(t, "unix", socket)
	idle.enter("", false)
	// In one piece, so that the second is there when the server is stopped.
	p.put(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0), uint32(3), "abc",
		uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(2), uint64(0), uint32(3), "xyz")
	<-entered
	stopped := make(chan struct{})
	go func() { defer close(stopped); stop() }()
	idle.wantClosed()
	select {
	case <-stopped:
		t.Fatal("Serve ended before the request")
	default:
	}
	close(gate)
	p.getSimple(0).want(t, 1, 0)
	p.getSimple(0).want(t, 2, ESHUTDOWN)
	p.wantClosed()
	<-stopped
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket is still there: %v", err)
	}
	got := make([]byte, 3)
	if _, err := d.ReadAt(got, 0); err != nil || string(got) != "abc" {
		t.Errorf("disk has %q, %v", got, err)
	}
}

func TestShutdownRefusesWhatStillComes(t *testing.T) {
	forms(t, func(t *testing.T, h headers) {
		entered, gate := make(chan struct{}), make(chan struct{})
		d := &hooked{WritableDisk: newMemDisk(diskSize), sync: func() error {
			close(entered)
			<-gate
			return nil
		}}
		s := &Server{Exports: static(t, Export{Disk: d})}
		socket, stop := start(t, s)
		p := dial(t, "unix", socket)
		p.enterAs("", h)
		haggler := dial(t, "unix", socket)
		haggler.hello(3)
		haggler.option(optList)
		p.request(0, cmdFlush, 1, 0, 0)
		<-entered
		stopped := make(chan struct{})
		go func() { defer close(stopped); stop() }()
		eventually(t, "the server stops", func() bool {
			_, err := os.Stat(socket)
			return errors.Is(err, os.ErrNotExist)
		})
		time.Sleep(shutdownGrace / 10)
		if k := last(haggler.option(optList)); k != repErrShutdown {
			t.Errorf("option: %#x", k)
		}
		if k := last(haggler.option(optAbort)); k != repAck {
			t.Errorf("ABORT: %#x", k)
		}
		// For longer than the grace that others have, because a request is in progress.
		for i := range uint64(10) {
			p.request(0, cmdWrite, 10+i, 0, 3, "abc")
			p.answer(0, 0).want(t, 10+i, ESHUTDOWN)
			p.request(0, cmdRead, 30+i, 0, 512)
			p.answer(0, 0).want(t, 30+i, ESHUTDOWN)
			time.Sleep(shutdownGrace / 5)
		}
		close(gate)
		p.answer(0, 0).want(t, 1, 0)
		p.wantClosed()
		<-stopped
	})
}

func TestShutdownCutsWhatDoesNotEnd(t *testing.T) {
	d := endless{newMemDisk(diskSize)}
	socket, stop := start(t, &Server{Exports: static(t, Export{Disk: d}), DrainTimeout: 50 * time.Millisecond})
	p := dial(t, "unix", socket)
	p.enter("", false)
	p.request(0, cmdRead, 1, 0, largeRead)
	begun := time.Now()
	stop() // fails the test if it does not return
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
}

// endless is a disk whose reads end only when they are cancelled.
type endless struct{ *memDisk }

func (endless) ReadAtContext(ctx context.Context, _ []byte, _ int64) (int, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

func TestReadsEndWhenTheClientGoes(t *testing.T) {
	s := &Server{Exports: static(t, Export{Disk: endless{newMemDisk(diskSize)}})}
	socket, _ := start(t, s)
	p := dial(t, "unix", socket)
	p.enter("", false)
	p.request(0, cmdRead, 1, 0, largeRead)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection ends", func() bool { return connections(s) == 0 })
}

func TestClientsThatVanishLeaveNothing(t *testing.T) {
	d := slow(newMemDisk(diskSize))
	s := &Server{Exports: static(t, Export{Disk: d}), MaxConnections: 1000}
	socket, _ := start(t, s)

	// All that a client might say, cut off at random points.
	var session []byte
	session = wire(session, uint32(3), "IHAVEOPT", uint32(8), uint32(0), "IHAVEOPT", uint32(3), uint32(0),
		"IHAVEOPT", uint32(7), uint32(6), goData(""))
	for i := range uint64(40) {
		session = wire(session, uint32(magicRequest), uint16(0), uint16(cmdRead), i, i<<16, uint32(100<<10),
			uint32(magicRequest), uint16(0), uint16(cmdRead), i, i<<16, uint32(512),
			uint32(magicRequest), uint16(1), uint16(cmdWrite), i, i<<16, uint32(80<<10), make([]byte, 80<<10),
			uint32(magicRequest), uint16(0), uint16(cmdFlush), i, uint64(0), uint32(0),
			uint32(magicRequest), uint16(0), uint16(cmdWriteZeroes), i, i<<16, uint32(100<<10))
	}
	before := runtime.NumGoroutine()
	rng := rand.New(rand.NewPCG(3, 4))
	var clients sync.WaitGroup
	for range 200 {
		n := rng.IntN(600)
		if rng.IntN(2) == 0 {
			n = rng.IntN(len(session))
		}
		listens := rng.IntN(2) == 0
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		clients.Go(func() {
			defer func() { _ = c.Close() }()
			_ = c.SetDeadline(time.Now().Add(200 * time.Millisecond))
			if listens {
				go func() { _, _ = io.Copy(io.Discard, c) }()
			}
			_, _ = c.Write(session[:n])
		})
	}
	clients.Wait()
	eventually(t, "all connections are gone", func() bool { return connections(s) == 0 })
	eventually(t, "all goroutines are gone", func() bool { return runtime.NumGoroutine() <= before })
}
