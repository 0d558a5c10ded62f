package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

func twoExports(t testing.TB) *Server {
	return &Server{Exports: static(t,
		Export{Name: "a", Description: "the first", Disk: newMemDisk(1 << 20)},
		Export{Name: "b", Disk: newMemDisk(2 << 20), ReadOnly: true})}
}

func TestInfoOfOneExportDoesNotAdmitToAnother(t *testing.T) {
	s := &Server{Exports: static(t, Export{Name: "disk", Disk: newMemDisk(1 << 20)})}
	socket, _ := start(t, s)
	p := dial(t, "unix", socket)
	p.hello(3)
	if k := last(p.option(6, goData(""))); k != repAck {
		t.Fatalf("INFO of the default export: %#x", k)
	}
	if k := last(p.option(7, goData("missing"))); k != repErrUnknown {
		t.Fatalf("GO to a missing export: %#x", k)
	}
	if k := last(p.option(7, goData("disk"))); k != repAck {
		t.Fatalf("GO after a refused one: %#x", k)
	}
}

func TestHugeLengthAllocatesNothing(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)

	for _, option := range []uint32{1, 2, 3, 6, 7, 8, 9, 10, 5, 12345} {
		p := dial(t, "unix", socket)
		p.hello(3)
		p.put("IHAVEOPT", option, uint32(math.MaxUint32), "some")
		p.wantClosed()
	}
	p := dial(t, "unix", socket)
	p.hello(3)
	for _, data := range [][]byte{
		wire(uint32(math.MaxUint32)),
		wire(uint32(math.MaxUint32), "abc", uint16(0)),
		wire(uint32(0), uint16(math.MaxUint16)),
	} {
		if k := last(p.option(7, data)); k != repErrInvalid {
			t.Errorf("GO with %x: %#x", data, k)
		}
	}
	p.option(8)
	for _, data := range [][]byte{
		wire(uint32(math.MaxUint32), "abc"),
		wire(uint32(1), "a", uint32(math.MaxUint32)),
		wire(uint32(1), "a", uint32(1), uint32(math.MaxUint32), "base:"),
		wire(uint32(1), "a", uint32(0), "rest"),
	} {
		if k := last(p.option(10, data)); k != repErrInvalid {
			t.Errorf("SET_META_CONTEXT with %x: %#x", data, k)
		}
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 4<<20 {
		t.Errorf("%d bytes allocated", got)
	}
}

func TestLongOptionIsRefusedAndSkipped(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	if k := last(p.option(7, long(maxOption+1))); k != repErrTooBig {
		t.Errorf("GO: %#x", k)
	}
	if k := last(p.option(77, long(maxOption+1))); k != repErrUnsupported {
		t.Errorf("unknown option: %#x", k)
	}
	if k := last(p.option(7, goData(long(maxString+1)))); k != repErrInvalid {
		t.Errorf("name over the limit: %#x", k)
	}
	if k := last(p.option(7, goData(long(maxString)))); k != repErrUnknown {
		t.Errorf("longest name: %#x", k)
	}
	if k := last(p.option(7, goData("a"))); k != repAck {
		t.Errorf("GO after all that: %#x", k)
	}
}

func TestUnknownOptionsAreUnsupported(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	for _, option := range []uint32{0, 4, 12, 99, math.MaxUint32} {
		if k := last(p.option(option, "some data")); k != repErrUnsupported {
			t.Errorf("option %d: %#x", option, k)
		}
	}
}

func TestStartTLSIsUnsupported(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	if k := last(p.option(5)); k != repErrUnsupported {
		t.Errorf("STARTTLS: %#x", k)
	}
	if k := last(p.option(5, "x")); k != repErrInvalid {
		t.Errorf("STARTTLS with data: %#x", k)
	}
}

func TestOptionsWithoutDataRefuseSome(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	for _, option := range []uint32{3, 8, 11} {
		if k := last(p.option(option, "x")); k != repErrInvalid {
			t.Errorf("option %d: %#x", option, k)
		}
	}
}

func TestAbortIsAcknowledged(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	if k := last(p.option(2, "ignored")); k != repAck {
		t.Errorf("ABORT: %#x", k)
	}
	p.wantClosed()
}

func TestListNamesExportsWithDescription(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	replies := p.option(3)
	if len(replies) != 3 || last(replies) != repAck {
		t.Fatalf("%d replies", len(replies))
	}
	for i, want := range []string{"\x00\x00\x00\x01athe first", "\x00\x00\x00\x01b"} {
		if got := string(replies[i].data); got != want || replies[i].kind != repServer {
			t.Errorf("reply %d is %#x %q, want %q", i, replies[i].kind, got, want)
		}
	}
}

func TestInfoTellsAllThatIsAsked(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	got := map[uint16]string{}
	for _, r := range p.option(6, goData("a", 1, 2, 3, 4711)) {
		if r.kind == repInfo {
			got[binary.BigEndian.Uint16(r.data)] = string(r.data[2:])
		}
	}
	flags := uint16(transHasFlags | transFlush | transFUA | transTrim | transWriteZeroes | transMultiConn | transCache | transFastZero)
	for kind, want := range map[uint16]string{
		infoExport:      string(wire(uint64(1<<20), flags)),
		infoName:        "a",
		infoDescription: "the first",
		infoBlockSize:   string(wire(uint32(1), uint32(4096), uint32(32<<20))),
	} {
		if got[kind] != want {
			t.Errorf("info %d is %q, want %q", kind, got[kind], want)
		}
	}
	if len(got) != 4 {
		t.Errorf("%d kinds of information", len(got))
	}
}

func TestReadOnlyExportOffersNoWriting(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	flags := p.enter("b", true)
	if flags&transReadOnly == 0 || flags&(transTrim|transWriteZeroes|transFastZero) != 0 {
		t.Errorf("flags %#x", flags)
	}
	if flags&transDF == 0 {
		t.Errorf("no DF with structured replies: %#x", flags)
	}
}

func TestExportNamePadsUnlessAgreedOtherwise(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	for flags, padding := range map[uint32]int{0: 124, 1: 124, 2: 0, 3: 0} {
		p := dial(t, "unix", socket)
		p.hello(flags)
		p.putOption(1, "b")
		if size := binary.BigEndian.Uint64(p.get(8)); size != 2<<20 {
			t.Errorf("size %d", size)
		}
		p.get(2 + padding)
		p.request(0, cmdRead, 7, 0, 4)
		p.getSimple(4).want(t, 7, 0)
	}
}

func TestExportNameOfUnknownExportHangsUp(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	for _, name := range []string{"", "c", "a\x00", "\xff", long(5000)} {
		p := dial(t, "unix", socket)
		p.hello(3)
		p.putOption(1, name)
		p.wantClosed()
	}
}

func TestDefaultExportIsTheOnlyOne(t *testing.T) {
	one, _ := start(t, &Server{Exports: static(t, Export{Name: "x", Disk: newMemDisk(4096)})})
	p := dial(t, "unix", one)
	p.hello(3)
	replies := p.option(7, goData("", infoName))
	if last(replies) != repAck {
		t.Fatalf("one export: %#x", last(replies))
	}
	if got := string(replies[2].data[2:]); got != "x" {
		t.Errorf("its name is %q", got)
	}
	two, _ := start(t, twoExports(t))
	p = dial(t, "unix", two)
	p.hello(3)
	if k := last(p.option(7, goData(""))); k != repErrUnknown {
		t.Errorf("two exports: %#x", k)
	}
}

func TestMetaContexts(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	for _, option := range []uint32{9, 10} {
		if k := last(p.option(option, metaData("a"))); k != repErrInvalid {
			t.Errorf("option %d before structured replies: %#x", option, k)
		}
	}
	p.agree(structuredHeaders)
	const depth = "qemu:allocation-depth"
	for _, c := range []struct {
		option  uint32
		queries []string
		found   []string
	}{
		{9, nil, []string{"base:allocation", depth}},
		{9, []string{"base:"}, []string{"base:allocation"}},
		{9, []string{"base:allocation"}, []string{"base:allocation"}},
		{9, []string{"qemu:"}, []string{depth}},
		{9, []string{depth, depth, "qemu:"}, []string{depth}},
		{9, []string{"qemu:dirty-bitmap:", "qemu:dirty-bitmap:x"}, nil},
		{9, []string{"base:other", "x-foo:bar", "nonsense"}, nil},
		{10, nil, nil},
		{10, []string{"base:", "qemu:", "qemu:dirty-bitmap:"}, nil},
		{10, []string{"qemu:dirty-bitmap:x"}, nil},
		{10, []string{"x-foo:bar", "base:allocation", "base:allocation"}, []string{"base:allocation"}},
		{10, []string{depth, "base:allocation"}, []string{depth, "base:allocation"}},
	} {
		replies := p.option(c.option, metaData("a", c.queries...))
		var found []string
		for i, r := range replies[:len(replies)-1] {
			found = append(found, string(r.data[4:]))
			if id := be32(r.data); c.option == 9 && id != 0 || c.option == 10 && id != uint32(i+1) {
				t.Errorf("option %d %q: ID %d", c.option, c.queries, id)
			}
		}
		if last(replies) != repAck || !slices.Equal(found, c.found) {
			t.Errorf("option %d %q: %q, last %#x", c.option, c.queries, found, last(replies))
		}
	}
	if k := last(p.option(10, metaData("a", make([]string, maxContexts+1)...))); k != repErrTooBig {
		t.Errorf("too many queries: %#x", k)
	}
	if k := last(p.option(10, metaData("missing", "base:allocation"))); k != repErrUnknown {
		t.Errorf("missing export: %#x", k)
	}
	// The failed selection above cleared the one before.
	if k := last(p.option(7, goData("a"))); k != repAck {
		t.Fatalf("GO: %#x", k)
	}
	p.request(0, cmdBlockStatus, 1, 0, 4096)
	p.getStructured(0, 0).want(t, 1, EINVAL)
}

func TestMetaContextOfAnotherExportDoesNotCount(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	p := dial(t, "unix", socket)
	p.hello(3)
	p.agree(structuredHeaders)
	p.option(10, uint32(1), "b", uint32(1), uint32(15), "base:allocation")
	p.option(7, goData("a"))
	p.request(0, cmdBlockStatus, 1, 0, 4096)
	p.getStructured(0, 0).want(t, 1, EINVAL)
}

func TestBadHandshakesAreHungUpOn(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	for name, say := range map[string][]byte{
		"unknown client flags":        wire(uint32(4)),
		"option without fixed":        wire(uint32(0), "IHAVEOPT", uint32(3), uint32(0)),
		"wrong magic":                 wire(uint32(3), "IHAVEOPS", uint32(3), uint32(0)),
		"transmission before GO":      wire(uint32(3), uint32(0x25609513), uint16(0), uint16(0), uint64(0), uint64(0), uint32(1)),
		"an export name that is long": wire(uint32(3), "IHAVEOPT", uint32(1), uint32(maxOption+1)),
	} {
		t.Run(name, func(t *testing.T) {
			p := dial(t, "unix", socket)
			p.get(18)
			p.put(say)
			p.wantClosed()
		})
	}
}

func TestHandshakeTimesOut(t *testing.T) {
	s := twoExports(t)
	s.HandshakeTimeout = 50 * time.Millisecond
	socket, _ := start(t, s)
	silent := dial(t, "unix", socket)
	silent.get(18)
	silent.wantClosed()

	// Once an export is chosen, a client may be silent for as long as it likes.
	p := dial(t, "unix", socket)
	p.enter("a", false)
	time.Sleep(4 * s.HandshakeTimeout)
	p.request(0, cmdRead, 1, 0, 1)
	p.getSimple(1).want(t, 1, 0)
}

func TestTooManyConnectionsAreTurnedAway(t *testing.T) {
	s := twoExports(t)
	s.MaxConnections = 2
	socket, _ := start(t, s)
	first := dial(t, "unix", socket)
	first.enter("a", false)
	second := dial(t, "unix", socket)
	second.enter("a", false)
	dial(t, "unix", socket).wantClosed()

	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a place becomes free", func() bool {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		n, _ := c.Read(make([]byte, 18))
		return n > 0
	})
}

type countingExports struct {
	*Static
	opened, released atomic.Int64
}

func (c *countingExports) Open(ctx context.Context, client Client, name string) (Export, error) {
	e, err := c.Static.Open(ctx, client, name)
	if err == nil {
		c.opened.Add(1)
		e.Release = func() { c.released.Add(1) }
	}
	return e, err
}

func TestEveryOpenIsReleased(t *testing.T) {
	from := &countingExports{Static: static(t, Export{Name: "x", Disk: newMemDisk(4096)})}
	socket, stop := start(t, &Server{Exports: from})
	p := dial(t, "unix", socket)
	p.hello(3)
	p.agree(structuredHeaders)
	p.option(6, goData("x"))
	p.option(10, uint32(1), "x", uint32(1), uint32(15), "base:allocation")
	p.option(7, goData(""))
	p.request(0, cmdRead, 1, 0, 16)
	p.getStructured(0, 16)
	q := dial(t, "unix", socket)
	q.hello(3)
	q.putOption(1, "x")
	q.get(10)
	stop()
	if opened, released := from.opened.Load(), from.released.Load(); opened != 4 || released != opened {
		t.Errorf("%d opened, %d released", opened, released)
	}
}

func TestStaticRefusesBadNames(t *testing.T) {
	d := newMemDisk(1)
	for _, exports := range [][]Export{
		{{Name: long(4097), Disk: d}},
		{{Name: "a\x00b", Disk: d}},
		{{Name: "\xff", Disk: d}},
		{{Name: "a", Description: "\xff", Disk: d}},
		{{Name: "a", Disk: d}, {Name: "a", Disk: d}},
		{{Name: "a"}},
	} {
		if _, err := NewStatic(exports...); !errors.Is(err, ErrExportName) {
			t.Errorf("%.40v: %v", exports, err)
		}
	}
}
