package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
)

// fuzzSession feeds bytes to a server over a connection in memory and takes all
// replies, until the server hangs up or has used up the input.
func fuzzSession(t *testing.T, s *Server, said []byte) {
	fuzzSessionOn(t, s, said, func(c net.Conn) (net.Conn, error) { return c, nil })
}

// fuzzSessionOn is fuzzSession after begin has done something with the connection.
func fuzzSessionOn(t *testing.T, s *Server, said []byte, begin func(net.Conn) (net.Conn, error)) {
	server, client := net.Pipe()
	s.begin.Do(s.init)
	c := newConn(s, server)
	if _, ok := s.shares.admit(c); !ok {
		t.Fatal("no place for a connection")
	}
	defer s.shares.leave(c)
	var wait sync.WaitGroup
	wait.Go(func() {
		if err := c.serve(t.Context()); err != nil {
			var e Errno
			_ = errors.As(err, &e) // any error will do
		}
	})
	client, err := begin(client)
	if err != nil {
		t.Fatal(err)
	}
	wait.Go(func() { _, _ = io.Copy(io.Discard, client) })
	if err := client.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write(said); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("server takes nothing and does not hang up: %v", err)
	}
	if err := client.Close(); err != nil && !errors.Is(err, io.ErrClosedPipe) { // TLS says its last words to who may be gone
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); wait.Wait() }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("session does not end")
	}
}

// fuzzServer has a writable disk and a read-only one, of which both can tell what
// differs from older states.
func fuzzServer(t testing.TB) *Server {
	d := newMemDisk(1<<20 + 17)
	if err := d.fill(100<<10, 200<<10); err != nil {
		t.Fatal(err)
	}
	disk := changing{memDisk: d}
	return &Server{Exports: static(t,
		Export{Name: "a", Description: "d", Disk: disk, History: fuzzPasts{}},
		Export{Name: "b", Disk: disk, ReadOnly: true, History: fuzzPasts{}})}
}

type fuzzPasts struct{}

func (fuzzPasts) List(context.Context) ([]string, error) { return []string{"old"}, nil }

func (fuzzPasts) Open(_ context.Context, name string) (restore.Disk, func(), error) {
	if name != "old" {
		return nil, nil, ErrUnknownPast
	}
	return newMemDisk(1), func() {}, nil
}

func FuzzHandshake(f *testing.F) {
	option := func(option uint32, data ...any) []byte {
		d := wire(data...)
		return wire("IHAVEOPT", option, uint32(len(d)), d)
	}
	all := metaData("a", contextAllocation, contextDepth, contextDirty+"old", contextDirty, "qemu:", "base:")
	for _, seed := range [][]byte{
		wire(uint32(3), option(optList)),
		wire(uint32(3), option(optExportName, "a")),
		wire(uint32(3), option(optStructuredReply), option(optSetMetaContext, metaData("a", contextAllocation)), option(optGo, goData("a"))),
		wire(uint32(3), option(optExtendedHeaders), option(optListMetaContext, all), option(optSetMetaContext, all), option(optGo, goData("a"))),
		wire(uint32(3), option(optExtendedHeaders), option(optStructuredReply), option(optSetMetaContext, all), option(optInfo, goData("a", 0, 1, 2, 3)),
			option(optSetMetaContext, metaData("b", contextDirty+"old")), option(optGo, goData("b")),
			uint32(magicExtendedRequest), uint16(0), uint16(cmdBlockStatus), uint64(1), uint64(0), uint64(1<<20)),
		wire(uint32(3), option(optExtendedHeaders, "x"), option(optExtendedHeaders), option(optExportName, "a")),
		wire(uint32(1), option(optInfo, goData("b", 1, 2, 3))),
		wire(uint32(1), option(optStartTLS), option(optAbort)),
		wire(uint32(3), "IHAVEOPT", uint32(optGo), uint32(0xffffffff)),
		wire(uint32(3), option(optGo, uint32(0xffffffff), uint16(0))),
		wire(uint32(3), option(optStructuredReply), option(optListMetaContext, uint32(1), "a", uint32(0xffffffff), uint32(5), "base:")),
	} {
		f.Add(seed)
	}
	s := fuzzServer(f)
	f.Fuzz(func(t *testing.T, said []byte) { fuzzSession(t, s, said) })
}

// tlsFuzzServer offers TLS, to clients of the authority that it returns.
func tlsFuzzServer(f *testing.F, required bool) (*Server, *authority) {
	ca := newAuthority(f, "ca")
	s := fuzzServer(f)
	s.TLS, _ = ca.serverTLS(required, false)
	return s, ca
}

// FuzzStartTLS is FuzzHandshake where there is TLS, up to the first bytes of it.
func FuzzStartTLS(f *testing.F) {
	hello := "\x16\x03\x01\x00\x2c\x01\x00\x00\x28\x03\x03" + long(32) + "\x00\x00\x02\x13\x01\x01\x00"
	start := wire("IHAVEOPT", uint32(5), uint32(0))
	for _, seed := range [][]byte{
		wire(uint32(3), start),
		wire(uint32(3), start, hello),
		wire(uint32(3), start, "IHAVEOPT", uint32(3), uint32(0)),
		wire(uint32(3), "IHAVEOPT", uint32(8), uint32(0), start, start),
		wire(uint32(3), "IHAVEOPT", uint32(1), uint32(1), "a"),
		wire(uint32(3), "IHAVEOPT", uint32(7), uint32(7), goData("a")),
		wire(uint32(3), "IHAVEOPT", uint32(5), uint32(1), "x"),
		wire(uint32(0), start),
	} {
		f.Add(false, seed)
		f.Add(true, seed)
	}
	optional, _ := tlsFuzzServer(f, false)
	required, _ := tlsFuzzServer(f, true)
	f.Fuzz(func(t *testing.T, must bool, said []byte) {
		s := optional
		if must {
			s = required
		}
		fuzzSession(t, s, said)
	})
}

// FuzzInTLS is FuzzHandshake within TLS.
func FuzzInTLS(f *testing.F) {
	meta := wire(uint32(1), "a", uint32(1), uint32(15), "base:allocation")
	for _, seed := range [][]byte{
		wire("IHAVEOPT", uint32(3), uint32(0), "IHAVEOPT", uint32(5), uint32(0)),
		wire("IHAVEOPT", uint32(8), uint32(0), "IHAVEOPT", uint32(10), uint32(len(meta)), meta, "IHAVEOPT", uint32(7), uint32(7), goData("a"),
			uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(1), uint64(0), uint32(100<<10)),
		wire("IHAVEOPT", uint32(1), uint32(1), "b", uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0), uint32(3), "abc"),
	} {
		f.Add(seed)
	}
	s, ca := tlsFuzzServer(f, true)
	f.Fuzz(func(t *testing.T, said []byte) {
		fuzzSessionOn(t, s, said, func(c net.Conn) (net.Conn, error) {
			if _, err := io.ReadFull(c, make([]byte, 18)); err != nil {
				return nil, err
			}
			if _, err := c.Write(wire(uint32(3), "IHAVEOPT", uint32(5), uint32(0))); err != nil {
				return nil, err
			}
			if _, err := io.ReadFull(c, make([]byte, 20)); err != nil {
				return nil, err
			}
			over := tls.Client(c, ca.client(nil))
			return over, over.HandshakeContext(t.Context())
		})
	})
}

func FuzzTransmission(f *testing.F) {
	one := func(flags, cmd uint16, off uint64, n uint32, payload ...any) []byte {
		return wire(uint32(magicRequest), flags, cmd, uint64(1), off, n, wire(payload...))
	}
	long := func(flags, cmd uint16, off, n uint64, payload ...any) []byte {
		return wire(uint32(magicExtendedRequest), flags, cmd, uint64(1), off, n, wire(payload...))
	}
	const simple, structured, extended = uint8(simpleHeaders), uint8(structuredHeaders), uint8(extendedHeaders)
	for cmd := range uint16(10) {
		f.Add(structured, true, one(0, cmd, 0, 16, "0123456789abcdef"))
		f.Add(simple, cmd%2 == 0, one(1, cmd, 1<<20, 17, "0123456789abcdefg"))
		f.Add(extended, true, long(cmdFlagPayloadLen, cmd, 0, 16, "0123456789abcdef"))
		f.Add(extended, cmd%2 == 0, long(0, cmd, 4096, 1<<20-4096))
	}
	f.Add(structured, true, append(one(0, cmdRead, 0, 1<<20), one(0, cmdRead, 5, 100<<10)...))
	f.Add(structured, false, append(one(0, cmdBlockStatus, 0, 1<<20), one(2, cmdWriteZeroes, 0, 1<<20)...))
	f.Add(structured, true, one(0, cmdWrite, 0, 0xffffffff))
	f.Add(extended, true, append(long(cmdFlagPayloadLen, cmdBlockStatus, 0, 16, uint64(1<<20), uint32(3), uint32(1)),
		long(cmdFlagPayloadLen|cmdFlagReqOne, cmdBlockStatus, 7, 12, uint64(1<<20-7), uint32(2))...))
	f.Add(extended, true, append(long(cmdFlagPayloadLen, cmdBlockStatus, 0, 1<<25, uint64(1)), long(cmdFlagPayloadLen, cmdWrite, 0, 1<<25)...))
	f.Add(extended, true, append(long(cmdFlagNoHole, cmdWriteZeroes, 0, 1<<63), long(0, cmdTrim, 1<<63, 1<<63)...))
	s := fuzzServer(f)
	f.Fuzz(func(t *testing.T, form uint8, writable bool, said []byte) {
		b := wire(uint32(3))
		name := "b"
		if writable {
			name = "a"
		}
		if h := headers(form % 3); h.chunked() {
			agree, meta := uint32(optStructuredReply), metaData(name, contextAllocation, contextDepth, contextDirty+"old")
			if h == extendedHeaders {
				agree = optExtendedHeaders
			}
			b = wire(b, "IHAVEOPT", agree, uint32(0), "IHAVEOPT", uint32(optSetMetaContext), uint32(len(meta)), meta)
		}
		b = wire(b, "IHAVEOPT", uint32(optGo), uint32(len(goData(name))), goData(name), said)
		fuzzSession(t, s, b)
	})
}
