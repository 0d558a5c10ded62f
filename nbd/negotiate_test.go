package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/backend"
	gonbd "github.com/pojntfx/go-nbd/pkg/server"
)

// negotiated dials, negotiates, and reads 16 bytes at off as the kernel's client would.
func negotiated(t *testing.T, network, address, export string, off uint64) (Remote, []byte) {
	t.Helper()
	p := dial(t, network, address)
	r, err := Negotiate(t.Context(), p.Conn, export)
	if err != nil {
		t.Fatal(err)
	}
	p.deadline(20 * time.Second)
	p.request(0, cmdRead, 7, off, 16)
	a := p.getSimple(16)
	a.want(t, 7, 0)
	return r, a.data
}

func TestNegotiateWithOurServer(t *testing.T) {
	d := newMemDisk(1 << 20)
	if _, err := d.WriteAt([]byte("sixteen bytes 16"), 4096); err != nil {
		t.Fatal(err)
	}
	socket, _ := start(t, &Server{Exports: static(t, Export{Name: "rw", Disk: d}, Export{Name: "ro", Disk: d, ReadOnly: true})})
	r, data := negotiated(t, "unix", socket, "rw", 4096)
	if r.Size != 1<<20 || r.ReadOnly || !r.Flush || !r.FUA || !r.Trim || !r.WriteZeroes || !r.MultiConn || r.Rotational ||
		r.MinBlock != 1 || r.PreferredBlock != preferredWritable || r.MaxBlock != maxPayload {
		t.Errorf("%+v", r)
	}
	if string(data) != "sixteen bytes 16" {
		t.Errorf("read %q", data)
	}
	if r, _ := negotiated(t, "unix", socket, "ro", 0); !r.ReadOnly || r.Trim {
		t.Errorf("%+v", r)
	}
	_, err := Negotiate(t.Context(), dial(t, "unix", socket).Conn, "other")
	if !errors.Is(err, ErrUnknownExport) || !strings.Contains(err.Error(), "no such export") {
		t.Errorf("unknown export: %v", err)
	}
}

// TestNegotiateWithOtherServers holds the client against servers that others wrote.
func TestNegotiateWithOtherServers(t *testing.T) {
	const size = 4 << 20
	image := filepath.Join(t.TempDir(), "image")
	run1(t, "truncate", "-s", "4M", image)
	serve := func(t *testing.T, program string, args ...string) string {
		need(t, program)
		socket := filepath.Join(t.TempDir(), "s")
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "SOCKET", socket)
		}
		c := exec.CommandContext(t.Context(), program, args...)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
		eventually(t, program+" listens", func() bool {
			n, err := net.Dial("unix", socket)
			if err == nil {
				_ = n.Close()
			}
			return err == nil
		})
		return socket
	}
	check := func(t *testing.T, r Remote) {
		if r.Size != size {
			t.Errorf("%+v", r)
		}
	}
	t.Run("qemu-nbd", func(t *testing.T) {
		r, _ := negotiated(t, "unix", serve(t, "qemu-nbd", "-t", "-e", "8", "-f", "raw", "-x", "disk", "-k", "SOCKET", image), "disk", 0)
		check(t, r)
		if !r.MultiConn || r.MaxBlock != 32<<20 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("nbdkit", func(t *testing.T) {
		r, _ := negotiated(t, "unix", serve(t, "nbdkit", "-f", "-U", "SOCKET", "memory", "4M"), "", 0)
		check(t, r)
	})
	t.Run("nbdkit with blocks", func(t *testing.T) {
		r, _ := negotiated(t, "unix", serve(t, "nbdkit", "-f", "-U", "SOCKET", "--filter=blocksize-policy", "memory", "4M",
			"blocksize-minimum=1024", "blocksize-preferred=8192", "blocksize-maximum=1M"), "", 0)
		check(t, r)
		if r.MinBlock != 1024 || r.PreferredBlock != 8192 || r.MaxBlock != 1<<20 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("nbdkit without NBD_OPT_GO", func(t *testing.T) {
		r, _ := negotiated(t, "unix", serve(t, "nbdkit", "-f", "-U", "SOCKET", "--mask-handshake=1", "--no-sr", "memory", "4M"), "", 0)
		check(t, r)
	})
	t.Run("nbdkit old style", func(t *testing.T) {
		_, err := Negotiate(t.Context(), dial(t, "unix", serve(t, "nbdkit", "-f", "-o", "-U", "SOCKET", "memory", "4M")).Conn, "")
		if !errors.Is(err, ErrNotNBD) || !strings.Contains(err.Error(), "old protocol") {
			t.Errorf("%v", err)
		}
	})
	t.Run("go-nbd", func(t *testing.T) {
		near, far := net.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- gonbd.Handle(far, []*gonbd.Export{{Name: "disk", Backend: backend.NewMemoryBackend(make([]byte, size))}}, nil)
		}()
		r, err := Negotiate(t.Context(), near, "disk")
		if err != nil {
			t.Fatal(err)
		}
		check(t, r)
		_ = near.Close()
		t.Logf("the other server ended: %v", <-done)
	})
}

// greeting is how a fixed newstyle server begins.
var greeting = wire("NBDMAGICIHAVEOPT", uint16(3))

func optReply(kind uint32, data ...any) []byte {
	d := wire(data...)
	return wire(uint64(magicReply), uint32(optGo), kind, uint32(len(d)), d)
}

func exportInfo(size uint64, flags uint16) []byte {
	return optReply(repInfo, uint16(infoExport), size, flags)
}

// script is a server that says what it is told to, whatever it is asked, and hangs up.
type script struct {
	net.Conn
	io.Reader
}

func (s script) Read(p []byte) (int, error)  { return s.Reader.Read(p) }
func (s script) Write(p []byte) (int, error) { return len(p), nil }
func (s script) SetDeadline(time.Time) error { return nil }

func scripted(t testing.TB, export string, says []byte) (Remote, error) {
	return Negotiate(t.Context(), script{Reader: bytes.NewReader(says)}, export)
}

func TestNegotiateRefusesWhatServersShouldNotSay(t *testing.T) {
	ack := optReply(repAck)
	for _, c := range []struct {
		name string
		says []byte
		want error
		text string
	}{
		{"nothing", nil, ErrNotNBD, "hung up"},
		{"HTTP", []byte("HTTP/1.1 400 Bad Request\r\n\r\n"), ErrNotNBD, "HTTP/1.1"},
		{"old style", wire("NBDMAGIC", uint64(0x00420281861253), uint64(1<<20), uint32(0), make([]byte, 124)), ErrNotNBD, "old protocol"},
		{"newstyle, not fixed", wire("NBDMAGICIHAVEOPT", uint16(0)), ErrNotNBD, "old protocol"},
		{"TLS", wire(greeting, optReply(repErrTLSRequired, "use \x1b[31mTLS\n")), ErrNeedsTLS, "it says: use [31mTLS"},
		{"unknown export", wire(greeting, optReply(repErrUnknown)), ErrUnknownExport, ""},
		{"policy", wire(greeting, optReply(repErrPolicy, "no")), ErrRefused, "policy"},
		{"shutdown", wire(greeting, optReply(repErrShutdown)), ErrRefused, "shutting down"},
		{"another error", wire(greeting, optReply(1<<31+99)), ErrRefused, "0x80000063"},
		{"hangs up on the option", greeting, ErrRefused, "hung up"},
		{"ends in a reply", wire(greeting, exportInfo(1<<20, 1)[:25]), ErrRefused, "hung up"},
		{"no size", wire(greeting, ack), ErrProtocol, "no size"},
		{"short size", wire(greeting, optReply(repInfo, uint16(infoExport), uint64(1<<20)), ack), ErrProtocol, "size of an export"},
		{"negative size", wire(greeting, exportInfo(1<<63, 1), ack), ErrProtocol, "size 9223372036854775808"},
		{"short block sizes", wire(greeting, optReply(repInfo, uint16(infoBlockSize), uint32(1))), ErrProtocol, "block sizes in 4"},
		{"odd block size", wire(greeting, optReply(repInfo, uint16(infoBlockSize), uint32(3), uint32(4096), uint32(8192))), ErrProtocol, "block sizes 3,"},
		{"no block size", wire(greeting, optReply(repInfo, uint16(infoBlockSize), uint32(0), uint32(4096), uint32(8192))), ErrProtocol, "block sizes 0,"},
		{"huge reply", wire(greeting, uint64(magicReply), uint32(optGo), uint32(repInfo), uint32(1<<31)), ErrProtocol, "2147483648 bytes"},
		{"reply to something else", wire(greeting, uint64(magicReply), uint32(optList), uint32(repAck), uint32(0)), ErrProtocol, "option 3"},
		{"bad reply magic", wire(greeting, uint64(1), uint32(optGo), uint32(repAck), uint32(0)), ErrProtocol, "reply 0x1"},
		{"information without a type", wire(greeting, optReply(repInfo, "x")), ErrProtocol, "1 bytes"},
		{"endless information", wire(greeting, bytes.Repeat(optReply(repInfo, uint16(infoName), "x"), 100)), ErrProtocol, "more than"},
		{"neither GO nor EXPORT_NAME", wire(greeting, optReply(repErrUnsupported)), ErrUnknownExport, "not available"},
		{"half an EXPORT_NAME", wire(greeting, optReply(repErrUnsupported), uint64(1)), ErrRefused, "hung up"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := scripted(t, "x", c.says)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || r != (Remote{}) {
				t.Errorf("%+v, %v; want %v, %q", r, err, c.want, c.text)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\x1b\n") {
				t.Errorf("the server writes to the terminal: %q", err)
			}
		})
	}
}

func TestNegotiateIgnoresWhatItDoesNotKnow(t *testing.T) {
	r, err := scripted(t, "x", wire(greeting, optReply(repInfo, uint16(77), "news"), exportInfo(512, transReadOnly), optReply(repAck)))
	if err != nil || r.Size != 512 || r.ReadOnly || r.Flags != 0 {
		t.Errorf("flags without NBD_FLAG_HAS_FLAGS mean something: %+v, %v", r, err)
	}
}

func TestNegotiateEndsWithItsContext(t *testing.T) {
	silent := func() net.Conn {
		near, far := net.Pipe()
		t.Cleanup(func() { _ = far.Close(); _ = near.Close() })
		return near
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if _, err := Negotiate(ctx, silent(), ""); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := Negotiate(ctx, silent(), ""); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func FuzzNegotiate(f *testing.F) {
	blocks := optReply(repInfo, uint16(infoBlockSize), uint32(1), uint32(4096), uint32(1<<25))
	f.Add(wire(greeting, exportInfo(1<<20, 0x1ff), blocks, optReply(repAck)))
	f.Add(wire(greeting, optReply(repErrUnsupported), uint64(1<<20), uint16(1)))
	f.Add(wire("NBDMAGICIHAVEOPT", uint16(1), optReply(repErrUnsupported), uint64(1<<20), uint16(1), make([]byte, 124)))
	f.Add(wire(greeting, optReply(repErrTLSRequired, "TLS")))
	f.Fuzz(func(t *testing.T, says []byte) {
		r, err := scripted(t, "x", says)
		if err != nil {
			if r != (Remote{}) {
				t.Errorf("%+v with %v", r, err)
			}
			return
		}
		if r.Size < 0 || !powerOfTwo(r.MinBlock) || r.MinBlock > r.PreferredBlock || r.MaxBlock < r.MinBlock {
			t.Errorf("%+v", r)
		}
	})
}

func TestParseURI(t *testing.T) {
	for s, want := range map[string]URI{
		"nbd://host":                            {"tcp", "host:10809", ""},
		"nbd://host/":                           {"tcp", "host:10809", ""},
		"nbd://host:7/disk%200":                 {"tcp", "host:7", "disk 0"},
		"nbd://[::1]/a/b":                       {"tcp", "[::1]:10809", "a/b"},
		"nbd:///d":                              {"tcp", "localhost:10809", "d"},
		"nbd+unix:///disk0?socket=/run/x.sock":  {"unix", "/run/x.sock", "disk0"},
		"nbd+unix:///?socket=relative%3fsocket": {"unix", "relative?socket", ""},
	} {
		if u, err := ParseURI(s); err != nil || u != want || !IsURI(s) {
			t.Errorf("%s: %+v, %v", s, u, err)
		}
	}
	for _, s := range []string{"", "web1@latest", "http://host/", "nbd:host", "nbd+unix:///x", "nbd+unix://host/x?socket=/s",
		"nbds://host/x", "nbd://host/%ff", "nbd://host/%00", "nbd://ho st/", "nbd+vsock://2/", "nbd://h/?socket=/x", "nbd+unix:///?socket=%00"} {
		if u, err := ParseURI(s); !errors.Is(err, ErrURI) {
			t.Errorf("%s: %+v, %v", s, u, err)
		}
	}
	if IsURI("web1@latest") || IsURI("http://nbd") || !IsURI("nbds://h") {
		t.Error("what means to be a URI")
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("nbd://host:7/disk0")
	f.Add("nbd+unix:///disk0?socket=/run/x")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err == nil && (u.Address == "" || !validString(u.Export)) {
			t.Errorf("%+v", u)
		}
	})
}
