package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/tidemark/tidemark/restore"
)

// giant is an empty writable disk of any size that notes what is asked of it.
type giant struct {
	restore.WritableDisk
	size  int64
	notes chan string
}

func (g giant) Size() int64 { return g.size }

func (g giant) Zero(off, n int64) error {
	g.notes <- fmt.Sprintf("zero %d %d", off, n)
	return nil
}

func (g giant) Trim(off, n int64) error {
	g.notes <- fmt.Sprintf("trim %d %d", off, n)
	return nil
}

func (g giant) Extents(_ context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) {
		const half = 1 << 40
		if off < half && !yield(restore.Extent{Off: off, Len: min(n, half-off), Zero: true}, nil) {
			return
		}
		if off+n > half {
			yield(restore.Extent{Off: max(off, half), Len: off + n - max(off, half)}, nil)
		}
	}
}

func TestExtendedLengthsBeyond32Bits(t *testing.T) {
	d := giant{newMemDisk(0), 3 << 40, make(chan string, 1)}
	p := serveAs(t, d, extendedHeaders, contextAllocation)
	p.put(p.encode(0, cmdTrim, 1, 5, 1<<40))
	p.answer(0, 0).want(t, 1, 0)
	if got, want := <-d.notes, fmt.Sprintf("trim 5 %d", int64(1)<<40); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	p.put(p.encode(0, cmdWriteZeroes, 2, 0, 3<<40))
	p.answer(0, 0).want(t, 2, 0)
	if got, want := <-d.notes, fmt.Sprintf("zero 0 %d", int64(3)<<40); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	p.put(p.encode(0, cmdBlockStatus, 3, 1<<30, 2<<40))
	a := p.answer(0, 0)
	a.want(t, 3, 0)
	if got, want := fmt.Sprint(a.byID), fmt.Sprint(map[uint32][][2]uint64{1: {{1<<40 - 1<<30, stateHole | stateZero}, {1<<40 + 1<<30, 0}}}); got != want {
		t.Errorf("block status %s, want %s", got, want)
	}
	for i, c := range []struct {
		flags, cmd  uint16
		off, length uint64
		want        Errno
	}{
		{0, cmdTrim, 1, 3 << 40, EINVAL},
		{0, cmdWriteZeroes, math.MaxUint64, math.MaxUint64, ENOSPC},
		{0, cmdTrim, 1 << 62, math.MaxUint64 - 1<<62 + 1, EINVAL},
		{0, cmdBlockStatus, 0, 3<<40 + 1, EINVAL},
		{0, cmdBlockStatus, 0, 0, EINVAL},
		{0, cmdRead, 0, 1 << 32, EINVAL},
		{cmdFlagNoHole, cmdWriteZeroes, 0, 1 << 32, EOVERFLOW},
		{0, cmdFlush, 0, 1 << 32, EINVAL},
		{0, cmdTrim, 0, 1<<32 + 7, 0},
	} {
		p.put(p.encode(c.flags, c.cmd, uint64(i), c.off, c.length))
		if a := p.answer(0, 0); a.handle != uint64(i) || a.errno != c.want {
			t.Errorf("%+v: got %v", c, a.errno)
		}
	}
}

func TestPayloadsAreTakenAsTheFlagSays(t *testing.T) {
	d := newMemDisk(diskSize)
	p := serveAs(t, d, extendedHeaders)
	head := func(flags, cmd uint16, handle, n uint64) []byte {
		p.sent[handle] = 0
		return wire(uint32(magicExtendedRequest), flags, cmd, handle, uint64(0), n)
	}
	p.put(head(0, cmdWrite, 1, 4096)) // no payload follows: the flag is missing
	p.answer(0, 0).want(t, 1, EINVAL)
	p.put(head(cmdFlagPayloadLen, cmdWrite, 2, 5), "hello")
	p.answer(0, 0).want(t, 2, 0)
	for i, cmd := range []uint16{cmdRead, cmdFlush, cmdTrim, cmdCache, cmdWriteZeroes, cmdBlockStatus, 8, 4711} {
		p.put(head(cmdFlagPayloadLen, cmd, uint64(10+i), 300<<10), make([]byte, 300<<10)) // is skipped
		p.answer(0, 0).want(t, uint64(10+i), EINVAL)
	}
	p.put(head(0, cmdRead, 3, 5))
	if a := p.answer(0, 5); string(a.data) != "hello" {
		t.Errorf("%q, %v", a.data, a.errno)
	}
	for _, cmd := range []uint16{cmdWrite, cmdTrim, cmdBlockStatus} {
		p := serveAs(t, d, extendedHeaders)
		p.put(wire(uint32(magicExtendedRequest), uint16(cmdFlagPayloadLen), cmd, uint64(1), uint64(0), uint64(maxPayload+1)))
		p.wantClosed()
	}
	// Compact requests have no such flag.
	p = serveAs(t, d, structuredHeaders, contextAllocation)
	p.request(cmdFlagPayloadLen, cmdBlockStatus, 1, 0, 4096)
	p.answer(0, 0).want(t, 1, EINVAL)
	p.request(cmdFlagPayloadLen, cmdWrite, 2, 0, 5, "HELLO")
	p.answer(0, 0).want(t, 2, EINVAL)
	p.request(0, cmdRead, 3, 0, 5)
	if a := p.answer(0, 5); string(a.data) != "hello" {
		t.Errorf("%q, %v", a.data, a.errno)
	}
}

func TestBlockStatusOfChosenContexts(t *testing.T) {
	d := newMemDisk(diskSize)
	if err := d.fill(memPage, memPage); err != nil {
		t.Fatal(err)
	}
	socket, _ := start(t, &Server{Exports: static(t, Export{Disk: d})})
	p := dial(t, "unix", socket)
	if flags := p.enterAs("", extendedHeaders, contextDepth, contextAllocation); flags&transBlockStatusPayload == 0 {
		t.Errorf("flags %#x", flags)
	}
	const hole = stateHole | stateZero
	depths := [][2]uint64{{memPage, 0}, {memPage, 1}, {2 * memPage, 0}}
	states := [][2]uint64{{memPage, hole}, {memPage, 0}, {2 * memPage, hole}}
	for i, c := range []struct {
		flags  uint16
		effect uint64
		ids    []uint32
		want   map[uint32][][2]uint64 // nil: EINVAL
	}{
		{0, 4 * memPage, []uint32{1, 2}, map[uint32][][2]uint64{1: depths, 2: states}},
		{0, 4 * memPage, []uint32{2}, map[uint32][][2]uint64{2: states}},
		{0, 4 * memPage, []uint32{2, 1}, map[uint32][][2]uint64{1: depths, 2: states}},
		{cmdFlagReqOne, 4 * memPage, []uint32{1}, map[uint32][][2]uint64{1: depths[:1]}},
		{0, 4 * memPage, nil, nil},
		{0, 4 * memPage, []uint32{1, 1}, nil},
		{0, 4 * memPage, []uint32{0}, nil},
		{0, 4 * memPage, []uint32{3}, nil},
		{0, 4 * memPage, []uint32{math.MaxUint32}, nil},
		{0, 4 * memPage, []uint32{1, 2, 1}, nil},
		{0, 0, []uint32{1}, nil},
		{0, diskSize + 1, []uint32{1}, nil},
		{0, math.MaxUint64, []uint32{1}, nil},
		{cmdFlagDF, 4 * memPage, []uint32{1}, nil},
	} {
		payload := wire(c.effect)
		for _, id := range c.ids {
			payload = wire(payload, id)
		}
		p.put(p.encode(c.flags|cmdFlagPayloadLen, cmdBlockStatus, uint64(i), 0, uint64(len(payload))), payload)
		a := p.answer(0, 0)
		switch {
		case c.want == nil:
			a.want(t, uint64(i), EINVAL)
		case a.errno != 0 || fmt.Sprint(a.byID) != fmt.Sprint(c.want):
			t.Errorf("%+v: %v, %v", c, a.byID, a.errno)
		}
	}
	for _, n := range []uint64{4, 7, 8, 13} { // not a number of IDs
		p.put(p.encode(cmdFlagPayloadLen, cmdBlockStatus, n, 0, n), make([]byte, n))
		p.answer(0, 0).want(t, n, EINVAL)
	}
	// Without a payload all contexts answer.
	p.request(0, cmdBlockStatus, 99, 0, 4*memPage)
	if a := p.answer(0, 0); len(a.byID) != 2 {
		t.Errorf("%v", a.byID)
	}
}

func TestFilterIsOfferedWhereItWorks(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	for _, c := range []struct {
		h        headers
		contexts []string
		want     bool
	}{
		{structuredHeaders, []string{contextAllocation}, false},
		{extendedHeaders, nil, false},
		{extendedHeaders, []string{contextAllocation}, true},
	} {
		p := dial(t, "unix", socket)
		if flags := p.enterAs("a", c.h, c.contexts...); flags&transBlockStatusPayload != 0 != c.want || flags&transDF == 0 {
			t.Errorf("%+v: flags %#x", c, flags)
		}
	}
}

func TestExtendedHeadersTakePrecedence(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	p.agree(structuredHeaders)
	p.agree(extendedHeaders)
	p.agree(extendedHeaders) // again is no harm
	if k := last(p.option(optStructuredReply)); k != repErrExtHeader {
		t.Errorf("structured replies after extended headers: %#x", k)
	}
	p.option(optGo, goData("a"))
	p.request(0, cmdRead, 1, 7, 100)
	p.answer(7, 100).want(t, 1, 0)

	p = dial(t, "unix", socket) // EXPORT_NAME must not be used then
	p.hello(3)
	p.agree(extendedHeaders)
	p.putOption(optExportName, "a")
	p.wantClosed()
}

func TestCompactRequestAfterExtendedHeadersEndsTheConnection(t *testing.T) {
	p := serveAs(t, newMemDisk(diskSize), extendedHeaders)
	p.put(wire(uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(1), uint64(0), uint32(1), uint32(0)))
	p.wantClosed()
	p = serveAs(t, newMemDisk(diskSize), structuredHeaders)
	p.put(wire(uint32(magicExtendedRequest), uint16(0), uint16(cmdRead), uint64(1), uint64(0), uint64(1)))
	p.wantClosed()
}

// pasts is a History in memory; Diff of a changing disk.
type pasts struct {
	names    []string
	opened   *atomic.Int64
	released *atomic.Int64
	err      error
}

func (h pasts) List(context.Context) ([]string, error) { return h.names, h.err }

func (h pasts) Open(_ context.Context, name string) (restore.Disk, func(), error) {
	if h.err != nil {
		return nil, nil, h.err
	}
	if !slices.Contains(h.names, name) && name != "unlisted" {
		return nil, nil, fmt.Errorf("%w: %s", ErrUnknownPast, name)
	}
	h.opened.Add(1)
	return newMemDisk(int64(len(name))), func() { h.released.Add(1) }, nil
}

// changing is a disk that differs from any other in its second and third page.
type changing struct {
	*memDisk
	err error
}

func (c changing) Diff(_ context.Context, _ restore.Disk, off, n int64) iter.Seq2[restore.Change, error] {
	return func(yield func(restore.Change, error) bool) {
		from, to := max(off, memPage), min(off+n, 3*memPage)
		if from < to && !yield(restore.Change{Off: from, Len: to - from}, nil) {
			return
		}
		if c.err != nil {
			yield(restore.Change{}, c.err)
		}
	}
}

func TestDirtyBitmaps(t *testing.T) {
	var opened, released atomic.Int64
	h := pasts{names: []string{"one", "two"}, opened: &opened, released: &released}
	d := changing{memDisk: newMemDisk(diskSize)}
	socket, stop := start(t, &Server{Exports: static(t,
		Export{Name: "x", Disk: d, History: h},
		Export{Name: "plain", Disk: newMemDisk(1), History: h}, // cannot be compared
		Export{Name: "broken", Disk: changing{newMemDisk(diskSize), errors.New("map is gone")}, History: h},
		Export{Name: "out", Disk: d, History: pasts{err: errors.New("storage is gone")}},
	)})
	p := dial(t, "unix", socket)
	p.hello(3)
	p.agree(structuredHeaders)
	list := func(name string, queries ...string) string {
		var found []string
		replies := p.option(optListMetaContext, metaData(name, queries...))
		for _, r := range replies[:len(replies)-1] {
			found = append(found, strings.TrimPrefix(string(r.data[4:]), contextDirty))
		}
		if k := last(replies); k != repAck {
			return fmt.Sprintf("%#x", k)
		}
		return strings.Join(found, " ")
	}
	for _, c := range []struct{ name, queries, want string }{
		{"x", "", "base:allocation qemu:allocation-depth one two"},
		{"x", "qemu:", "qemu:allocation-depth one two"},
		{"x", "qemu:dirty-bitmap:", "one two"},
		{"x", "qemu:dirty-bitmap:two", "two"},
		{"x", "qemu:dirty-bitmap:unlisted", "unlisted"},
		{"x", "qemu:dirty-bitmap: qemu:dirty-bitmap:unlisted", "one two unlisted"},
		{"x", "qemu:dirty-bitmap:three", ""},
		{"plain", "qemu:", "qemu:allocation-depth"},
		{"plain", "qemu:dirty-bitmap:two", ""},
		{"out", "base:", "base:allocation"},
		{"out", "qemu:", fmt.Sprintf("%#x", uint32(repErrUnknown))},
		{"out", "qemu:dirty-bitmap:two", fmt.Sprintf("%#x", uint32(repErrUnknown))},
	} {
		if got := list(c.name, strings.Fields(c.queries)...); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
	if k := last(p.option(optSetMetaContext, metaData("out", "base:allocation", contextDirty+"two"))); k != repErrUnknown {
		t.Errorf("selection from storage that is gone: %#x", k)
	}
	p.option(optSetMetaContext, metaData("x", contextDirty+"one")) // given up below
	p = dial(t, "unix", socket)
	p.enterAs("x", structuredHeaders, contextDirty+"two", contextAllocation, contextDirty+"unlisted")
	p.request(0, cmdBlockStatus, 1, 0, 8*memPage)
	a := p.answer(0, 0)
	a.want(t, 1, 0)
	want := [][2]uint64{{memPage, 0}, {2 * memPage, stateDirty}, {5 * memPage, 0}}
	if fmt.Sprint(a.byID[1]) != fmt.Sprint(want) || fmt.Sprint(a.byID[3]) != fmt.Sprint(want) || len(a.byID) != 3 || a.chunks != 3 {
		t.Errorf("%d chunks, %v", a.chunks, a.byID)
	}
	p.request(cmdFlagReqOne, cmdBlockStatus, 2, 2*memPage+512, 8*memPage-512-2*memPage)
	if a := p.answer(0, 0); fmt.Sprint(a.byID[1]) != fmt.Sprint([][2]uint64{{memPage - 512, stateDirty}}) {
		t.Errorf("%v", a.byID)
	}
	p = dial(t, "unix", socket)
	p.enterAs("broken", extendedHeaders, contextAllocation, contextDirty+"two")
	p.request(0, cmdBlockStatus, 3, 0, 8*memPage)
	p.answer(0, 0).want(t, 3, EIO)
	stop()
	if opened.Load() == 0 || released.Load() != opened.Load() {
		t.Errorf("%d states opened, %d released", opened.Load(), released.Load())
	}
}

// moving gives out another disk each time it is asked.
type moving struct{ next byte }

func (m *moving) List(context.Context, Client) ([]Listing, error) { return nil, nil }

func (m *moving) Open(context.Context, Client, string) (Export, error) {
	m.next++
	d := newMemDisk(memPage)
	_, err := d.WriteAt(bytes.Repeat([]byte{m.next}, memPage), 0)
	return Export{Name: fmt.Sprint(m.next), Disk: d, Moving: true}, err
}

func TestMovingExport(t *testing.T) {
	socket, _ := start(t, &Server{Exports: &moving{}})
	p := dial(t, "unix", socket)
	// The one that the contexts were selected for is the one that is entered.
	if flags := p.enterAs("latest", structuredHeaders, contextAllocation); flags&transMultiConn != 0 {
		t.Error("clients are told that all connections show the same disk")
	}
	p.request(0, cmdRead, 1, 0, 1)
	if a := p.answer(0, 1); a.data[0] != 1 {
		t.Errorf("disk %d", a.data[0])
	}
	p.request(0, cmdBlockStatus, 2, 0, 1)
	p.answer(0, 0).want(t, 2, 0)
}
