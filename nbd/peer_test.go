package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// start serves s on a unix socket until the test ends, and checks that it stops
// without an error. It returns the socket's path and a function that stops it
// before.
func start(t testing.TB, s *Server) (socket string, stop func()) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	return socket, startOn(t, s, "unix", socket)
}

func startOn(t testing.TB, s *Server, network, address string) (stop func()) {
	t.Helper()
	l, err := Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	return startListener(t, s, l)
}

func startListener(t testing.TB, s *Server, l net.Listener) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("Serve does not end")
		}
	}
	t.Cleanup(stop)
	return stop
}

func static(t testing.TB, exports ...Export) *Static {
	t.Helper()
	s, err := NewStatic(exports...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// peer is a client that says what it is told to, right or wrong.
type peer struct {
	t testing.TB
	net.Conn
	headers headers            // agreed on
	sent    map[uint64]uint64  // offsets by handle, which extended replies repeat
	parts   map[uint64]*answer // of next
}

func dial(t testing.TB, network, address string) *peer {
	t.Helper()
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	p := &peer{t: t, Conn: c, sent: map[uint64]uint64{}}
	p.deadline(20 * time.Second)
	return p
}

func (p *peer) deadline(d time.Duration) {
	if err := p.SetDeadline(time.Now().Add(d)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) put(parts ...any) {
	p.t.Helper()
	if _, err := p.Write(wire(parts...)); err != nil {
		p.t.Fatalf("write: %v", err)
	}
}

// wire encodes integers, strings and byte slices one after the other.
func wire(parts ...any) []byte {
	var b []byte
	for _, part := range parts {
		switch v := part.(type) {
		case uint16:
			b = binary.BigEndian.AppendUint16(b, v)
		case uint32:
			b = binary.BigEndian.AppendUint32(b, v)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, v)
		case string:
			b = append(b, v...)
		case []byte:
			b = append(b, v...)
		default:
			panic("wire: type not known")
		}
	}
	return b
}

func (p *peer) get(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p, b); err != nil {
		p.t.Fatalf("read of %d bytes: %v", n, err)
	}
	return b
}

// wantClosed checks that the server hangs up and says nothing more.
func (p *peer) wantClosed() {
	p.t.Helper()
	n, err := p.Read(make([]byte, 1))
	var ne net.Error
	if n > 0 || err == nil || errors.As(err, &ne) && ne.Timeout() {
		p.t.Fatalf("server did not hang up: %d bytes, %v", n, err)
	}
}

// hello runs the first exchange with these client flags.
func (p *peer) hello(flags uint32) {
	p.t.Helper()
	want := wire("NBDMAGICIHAVEOPT", uint16(3))
	if got := p.get(18); !bytes.Equal(got, want) {
		p.t.Fatalf("greeting is %x", got)
	}
	p.put(flags)
}

type optionReply struct {
	kind uint32
	data []byte
}

func (p *peer) putOption(option uint32, data ...any) {
	p.t.Helper()
	d := wire(data...)
	p.put("IHAVEOPT", option, uint32(len(d)), d)
}

func (p *peer) getOptionReply(option uint32) optionReply {
	p.t.Helper()
	h := p.get(20)
	if m := binary.BigEndian.Uint64(h); m != 0x3e889045565a9 {
		p.t.Fatalf("reply magic %#x", m)
	}
	if o := binary.BigEndian.Uint32(h[8:]); o != option {
		p.t.Fatalf("reply to option %d instead of %d", o, option)
	}
	return optionReply{binary.BigEndian.Uint32(h[12:]), p.get(int(binary.BigEndian.Uint32(h[16:])))}
}

// option sends one and returns its replies up to the final one.
func (p *peer) option(option uint32, data ...any) []optionReply {
	p.t.Helper()
	p.putOption(option, data...)
	var all []optionReply
	for {
		r := p.getOptionReply(option)
		all = append(all, r)
		if r.kind == 1 {
			switch option {
			case 5:
				p.headers = simpleHeaders
			case 8:
				p.headers = structuredHeaders
			case 11:
				p.headers = extendedHeaders
			}
		}
		if r.kind == 1 || r.kind>>31 == 1 {
			return all
		}
	}
}

func last(replies []optionReply) uint32 { return replies[len(replies)-1].kind }

func goData(name string, infos ...uint16) []byte {
	b := wire(uint32(len(name)), name, uint16(len(infos)))
	for _, i := range infos {
		b = wire(b, i)
	}
	return b
}

// enter goes into the transmission phase and returns the transmission flags.
func (p *peer) enter(name string, structured bool) uint16 {
	p.t.Helper()
	if structured {
		return p.enterAs(name, structuredHeaders, "base:allocation")
	}
	return p.enterAs(name, simpleHeaders)
}

// agree agrees on a form of headers.
func (p *peer) agree(h headers) {
	p.t.Helper()
	if option := map[headers]uint32{structuredHeaders: 8, extendedHeaders: 11}[h]; option != 0 {
		if k := last(p.option(option)); k != 1 {
			p.t.Fatalf("headers %d: %#x", h, k)
		}
	}
}

// metaData is the data of both options on metadata contexts.
func metaData(export string, queries ...string) []byte {
	b := wire(uint32(len(export)), export, uint32(len(queries)))
	for _, q := range queries {
		b = wire(b, uint32(len(q)), q)
	}
	return b
}

// enterAs is enter with any form of headers and any contexts, whose IDs are their
// places in the list, from 1 on.
func (p *peer) enterAs(name string, h headers, contexts ...string) uint16 {
	p.t.Helper()
	p.hello(3)
	p.agree(h)
	if len(contexts) > 0 {
		replies := p.option(10, metaData(name, contexts...))
		if len(replies) != len(contexts)+1 {
			p.t.Fatalf("metadata contexts %q: %v", contexts, replies)
		}
		for i, r := range replies[:len(contexts)] {
			if r.kind != 4 || be32(r.data) != uint32(i+1) || string(r.data[4:]) != contexts[i] {
				p.t.Fatalf("metadata context %q: %#x %q", contexts[i], r.kind, r.data)
			}
		}
	}
	replies := p.option(7, goData(name))
	if last(replies) != 1 {
		p.t.Fatalf("GO: %#x", last(replies))
	}
	for _, r := range replies {
		if r.kind == 3 && binary.BigEndian.Uint16(r.data) == 0 {
			return binary.BigEndian.Uint16(r.data[10:])
		}
	}
	p.t.Fatal("GO without NBD_INFO_EXPORT")
	return 0
}

func (p *peer) request(flags, cmd uint16, handle, off uint64, length uint32, payload ...any) {
	p.t.Helper()
	p.put(p.encode(flags, cmd, handle, off, uint64(length)), wire(payload...))
}

// encode returns the head of a request.
func (p *peer) encode(flags, cmd uint16, handle, off, length uint64) []byte {
	if p.headers != extendedHeaders {
		return wire(uint32(0x25609513), flags, cmd, handle, off, uint32(length))
	}
	p.sent[handle] = off
	if cmd == 1 {
		flags |= 1 << 5
	}
	return wire(uint32(0x21e41c71), flags, cmd, handle, off, length)
}

// getChunk reads what follows the first 16 bytes of a chunk.
func (p *peer) getChunk(head []byte) (flags, kind uint16, body []byte) {
	p.t.Helper()
	flags, kind = binary.BigEndian.Uint16(head[4:]), binary.BigEndian.Uint16(head[6:])
	switch m := be32(head); {
	case m == 0x668e33ef && p.headers == structuredHeaders:
		return flags, kind, p.get(int(be32(p.get(4))))
	case m == 0x6e8a278c && p.headers == extendedHeaders:
		rest := p.get(16)
		if off := be64(rest); off != p.sent[be64(head[8:])] {
			p.t.Fatalf("reply to offset %d instead of %d", off, p.sent[be64(head[8:])])
		}
		return flags, kind, p.get(int(be64(rest[8:])))
	default:
		p.t.Fatalf("reply magic %#x with headers %d", m, p.headers)
		return 0, 0, nil
	}
}

// answer is what came for one request: the last error, the data of a read with
// its holes filled, how many chunks, and the descriptors of a block status, also by
// the context's ID.
type answer struct {
	handle uint64
	errno  Errno
	data   []byte
	chunks int
	holes  int
	status [][2]uint32
	byID   map[uint32][][2]uint64
	why    string
}

// getSimple reads a simple reply with n bytes of data if it is a success.
func (p *peer) getSimple(n int) answer {
	p.t.Helper()
	h := p.get(16)
	if m := binary.BigEndian.Uint32(h); m != 0x67446698 {
		p.t.Fatalf("simple reply magic %#x", m)
	}
	a := answer{handle: binary.BigEndian.Uint64(h[8:]), errno: Errno(binary.BigEndian.Uint32(h[4:]))}
	if a.errno == 0 {
		a.data = p.get(n)
	}
	return a
}

// getStructured reads replies until one request is answered in full: a simple
// reply, or chunks up to the done flag. off and n are those of the read.
func (p *peer) getStructured(off uint64, n int) answer {
	p.t.Helper()
	a := answer{data: make([]byte, n)}
	covered := 0
	for {
		head := p.get(16)
		a.handle = binary.BigEndian.Uint64(head[8:])
		if be32(head) == 0x67446698 && p.headers == structuredHeaders {
			a.errno = Errno(binary.BigEndian.Uint32(head[4:]))
			return a
		}
		flags, kind, body := p.getChunk(head)
		a.chunks++
		switch kind {
		case 0:
		case 1:
			at := binary.BigEndian.Uint64(body) - off
			covered += copy(a.data[at:], body[8:])
		case 2:
			a.holes++
			covered += int(binary.BigEndian.Uint32(body[8:]))
		case 5:
			for d := body[4:]; len(d) > 0; d = d[8:] {
				a.status = append(a.status, [2]uint32{binary.BigEndian.Uint32(d), binary.BigEndian.Uint32(d[4:])})
				a.note(p, be32(body), uint64(be32(d)), uint64(be32(d[4:])))
			}
		case 6:
			if n := int(be32(body[4:])); n == 0 || len(body) != 8+16*n || p.headers != extendedHeaders {
				p.t.Fatalf("extended block status of %d bytes says %d descriptors", len(body), n)
			}
			for d := body[8:]; len(d) > 0; d = d[16:] {
				a.note(p, be32(body), be64(d), be64(d[8:]))
			}
		case 1<<15 + 1:
			a.errno = Errno(binary.BigEndian.Uint32(body))
			a.why = string(body[6:])
		default:
			p.t.Fatalf("chunk type %d", kind)
		}
		if flags&1 != 0 {
			if n > 0 && a.errno == 0 && covered != n {
				p.t.Fatalf("reply covers %d of %d bytes", covered, n)
			}
			return a
		}
	}
}

// note adds a descriptor of a block status.
func (a *answer) note(p *peer, id uint32, n, status uint64) {
	if n == 0 {
		p.t.Fatal("descriptor of no length")
	}
	if a.byID == nil {
		a.byID = map[uint32][][2]uint64{}
	}
	a.byID[id] = append(a.byID[id], [2]uint64{n, status})
}

// both runs f with simple and with structured replies.
func both(t *testing.T, f func(t *testing.T, structured bool)) {
	t.Run("simple", func(t *testing.T) { f(t, false) })
	t.Run("structured", func(t *testing.T) { f(t, true) })
}

// forms runs f with each form of headers.
func forms(t *testing.T, f func(t *testing.T, h headers)) {
	t.Run("simple", func(t *testing.T) { f(t, simpleHeaders) })
	t.Run("structured", func(t *testing.T) { f(t, structuredHeaders) })
	t.Run("extended", func(t *testing.T) { f(t, extendedHeaders) })
}

// answer reads an answer in the form agreed on.
func (p *peer) answer(off uint64, n int) answer {
	p.t.Helper()
	if p.headers.chunked() {
		return p.getStructured(off, n)
	}
	return p.getSimple(n)
}

func (a answer) want(t testing.TB, handle uint64, e Errno) {
	t.Helper()
	if a.handle != handle || a.errno != e {
		t.Fatalf("answer to %d is %q (%d), want %d, %q (%d)", a.handle, a.errno, a.errno, handle, e, e)
	}
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>8) ^ byte(i)*7 ^ seed
	}
	return b
}

func long(n int) string { return strings.Repeat("x", n) }

func be32(p []byte) uint32 { return binary.BigEndian.Uint32(p) }
func be64(p []byte) uint64 { return binary.BigEndian.Uint64(p) }

// connections counts those that a server has.
func connections(s *Server) int {
	s.begin.Do(s.init)
	s.shares.mu.Lock()
	defer s.shares.mu.Unlock()
	return s.shares.conns
}
