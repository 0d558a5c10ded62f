package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// upgrade goes over to TLS and returns the error of the handshake. With TLS 1.3 a
// server's refusal shows at the first read only, so one option is asked too.
func (p *peer) upgrade(config *tls.Config) error {
	p.t.Helper()
	if k := last(p.option(optStartTLS)); k != repAck {
		p.t.Fatalf("STARTTLS: %#x", k)
	}
	c := tls.Client(p.Conn, config)
	if err := c.HandshakeContext(p.t.Context()); err != nil {
		return err
	}
	p.Conn = c
	if _, err := p.Write(wire("IHAVEOPT", uint32(optList), uint32(1), "x")); err != nil {
		return err
	}
	head := make([]byte, 20)
	if _, err := p.Read(head); err != nil {
		return err
	}
	if be32(head[12:]) != repErrInvalid {
		p.t.Fatalf("LIST with data: %x", head)
	}
	p.get(int(be32(head[16:])))
	return nil
}

// tlsServer serves a and b and returns its socket.
func tlsServer(t *testing.T, with *TLS) (*Server, string) {
	t.Helper()
	s := twoExports(t)
	s.TLS = with
	socket, _ := start(t, s)
	return s, socket
}

func TestRequiredTLSRefusesEveryOtherOption(t *testing.T) {
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(true, true)
	_, socket := tlsServer(t, with)
	p := dial(t, "unix", socket)
	p.hello(3)
	for _, option := range []uint32{3, 4, 6, 7, 8, 9, 10, 11, 12345} {
		for _, data := range []string{"", "x", string(goData("a")), long(maxOption + 1)} {
			if r := p.option(option, data); len(r) != 1 || last(r) != 1<<31+5 || !strings.Contains(string(r[0].data), "requires TLS") {
				t.Errorf("option %d with %d bytes: %#x", option, len(data), last(r))
			}
		}
	}
	mine := ca.issue("me", nil)
	if err := p.upgrade(ca.client(&mine)); err != nil {
		t.Fatal(err)
	}
	for _, option := range []uint32{3, 4, 6, 8} {
		if k := last(p.option(option)); k == 1<<31+5 {
			t.Errorf("option %d: TLS is required with TLS", option)
		}
	}
	if k := last(p.option(optStartTLS)); k != repErrInvalid {
		t.Errorf("TLS over TLS: %#x", k)
	}
	if k := last(p.option(optGo, goData("a"))); k != repAck {
		t.Fatalf("GO: %#x", k)
	}
	p.request(0, cmdWrite, 1, 4096, 5, "hello")
	p.getStructured(0, 0).want(t, 1, 0)
	p.request(0, cmdRead, 2, 4096, 5)
	if a := p.getStructured(4096, 5); string(a.data) != "hello" {
		t.Errorf("read %q", a.data)
	}
}

func TestRequiredTLSHangsUpOnExportName(t *testing.T) {
	with, _ := newAuthority(t, "ca").serverTLS(true, true)
	_, socket := tlsServer(t, with)
	for _, flags := range []uint32{0, 3} {
		p := dial(t, "unix", socket)
		p.hello(flags)
		p.putOption(optExportName, "a")
		p.wantClosed()
	}
	p := dial(t, "unix", socket)
	p.hello(3)
	if k := last(p.option(optAbort)); k != repAck {
		t.Errorf("ABORT: %#x", k)
	}
	p.wantClosed()
}

func TestOptionalTLSServesBoth(t *testing.T) {
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(false, true)
	_, socket := tlsServer(t, with)
	p := dial(t, "unix", socket)
	p.enter("a", true)
	p.request(0, cmdRead, 1, 0, 16)
	p.getStructured(0, 16).want(t, 1, 0)

	p = dial(t, "unix", socket)
	p.hello(3)
	if k := last(p.option(optStartTLS, "x")); k != repErrInvalid {
		t.Errorf("STARTTLS with data: %#x", k)
	}
	mine := ca.issue("me", nil)
	if err := p.upgrade(ca.client(&mine)); err != nil {
		t.Fatal(err)
	}
	if k := last(p.option(optGo, goData("a"))); k != repAck {
		t.Fatalf("GO: %#x", k)
	}
}

// What was agreed on in plain text may have been put there by somebody else
// (CVE-2021-3716).
func TestNothingAgreedInPlainTextHoldsInTLS(t *testing.T) {
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(false, false)
	_, socket := tlsServer(t, with)
	p := dial(t, "unix", socket)
	p.hello(3)
	meta := wire(uint32(1), "a", uint32(1), uint32(15), "base:allocation")
	for _, option := range []struct {
		number uint32
		data   []byte
	}{{optStructuredReply, nil}, {optSetMetaContext, meta}} {
		if k := last(p.option(option.number, option.data)); k != repAck {
			t.Fatalf("option %d: %#x", option.number, k)
		}
	}
	if err := p.upgrade(ca.client(nil)); err != nil {
		t.Fatal(err)
	}
	if k := last(p.option(optSetMetaContext, meta)); k != repErrInvalid {
		t.Errorf("metadata context without structured replies: %#x", k)
	}
	replies := p.option(optGo, goData("a"))
	if last(replies) != repAck {
		t.Fatalf("GO: %#x", last(replies))
	}
	if flags := uint16(replies[0].data[10])<<8 | uint16(replies[0].data[11]); flags&transDF != 0 {
		t.Errorf("flags %#x are those with structured replies", flags)
	}
	p.request(0, cmdRead, 1, 0, 16)
	p.getSimple(16).want(t, 1, 0)
}

func TestPlainTextBehindStartTLSIsRefused(t *testing.T) {
	ca := newAuthority(t, "ca")
	for _, required := range []bool{false, true} {
		with, _ := ca.serverTLS(required, false)
		_, socket := tlsServer(t, with)
		list := wire("IHAVEOPT", uint32(optList), uint32(0))

		p := dial(t, "unix", socket) // in one piece with the option
		p.hello(3)
		p.put("IHAVEOPT", uint32(optStartTLS), uint32(0), list)
		p.wantClosed()

		p = dial(t, "unix", socket) // after the acknowledgement
		p.hello(3)
		if k := last(p.option(optStartTLS)); k != repAck {
			t.Fatalf("STARTTLS: %#x", k)
		}
		p.put(list)
		said := new(bytes.Buffer)
		if _, err := said.ReadFrom(p); err != nil && !errors.Is(err, os.ErrClosed) && said.Len() == 0 {
			t.Logf("hung up: %v", err)
		}
		if bytes.Contains(said.Bytes(), wire(uint64(magicReply))) || said.Len() > 7 { // no more than an alert
			t.Errorf("answer to plain text: %x", said.Bytes())
		}
	}
}

func TestClientsWithoutProofAreRefused(t *testing.T) {
	ca, other := newAuthority(t, "ca"), newAuthority(t, "ca")
	with, dir := ca.serverTLS(true, true)
	good, old, foreign, revoked, onlyServer := ca.issue("good", nil), ca.issue("old", expired), other.issue("good", nil), ca.issue("revoked", nil), ca.issue("x", nil)
	put(t, dir, crlFile, ca.revoke(time.Now().Add(time.Hour), revoked))
	_, socket := tlsServer(t, with)
	for name, c := range map[string]struct {
		cert *tls.Certificate
		max  uint16
		ok   bool
	}{
		"good":              {&good, 0, true},
		"good, TLS 1.2":     {&good, tls.VersionTLS12, true},
		"TLS 1.1":           {&good, tls.VersionTLS11, false},
		"no certificate":    {nil, 0, false},
		"expired":           {&old, 0, false},
		"other authority":   {&foreign, 0, false},
		"revoked":           {&revoked, 0, false},
		"revoked, TLS 1.2":  {&revoked, tls.VersionTLS12, false},
		"key not its own":   {&tls.Certificate{Certificate: good.Certificate, PrivateKey: onlyServer.PrivateKey, Leaf: good.Leaf}, 0, false},
		"good, still there": {&good, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := dial(t, "unix", socket)
			p.hello(3)
			config := ca.client(c.cert)
			if config.MaxVersion = c.max; c.max != 0 {
				config.MinVersion = tls.VersionTLS10
			}
			if c.cert != nil { // even if the server has not asked for one of its authority
				config.Certificates = nil
				config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.cert, nil }
			}
			if err := p.upgrade(config); (err == nil) != c.ok {
				t.Errorf("handshake: %v", err)
			}
		})
	}
}

func TestExportsLearnTheCertificate(t *testing.T) {
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(false, false)
	from := secretive{Static: static(t, Export{Name: "a", Disk: newMemDisk(1)}), may: func(c Client, _ string) bool { return c.Certificate != nil }, seen: make(chan Client, 16)}
	socket, _ := start(t, &Server{Exports: from, TLS: with})
	p := dial(t, "unix", socket)
	p.hello(3)
	if n := len(p.option(optList)); n != 1 {
		t.Errorf("%d replies to LIST in plain text", n)
	}
	if c := <-from.seen; c.TLS || c.Certificate != nil {
		t.Errorf("plain: %+v", c)
	}
	mine := ca.issue("standby1", manyNames)
	if err := p.upgrade(ca.client(&mine)); err != nil {
		t.Fatal(err)
	}
	if n := len(p.option(optList)); n != 2 {
		t.Errorf("%d replies to LIST with a certificate", n)
	}
	c := <-from.seen
	if !c.TLS || c.Unix == nil {
		t.Errorf("TLS: %+v", c)
	}
	want := "CN=standby1 DNS=a.example.org DNS=B.example.org IP=127.0.0.1 EMAIL=me@example.org URI=spiffe://example.org/standby"
	if got := strings.Join(c.Names(), " "); got != want {
		t.Errorf("names %s", got)
	}

	// A certificate that is not verified proves nothing.
	p = dial(t, "unix", socket)
	p.hello(3)
	if err := p.upgrade(ca.client(nil)); err != nil {
		t.Fatal(err)
	}
	p.option(optList)
	if c := <-from.seen; !c.TLS || c.Certificate != nil {
		t.Errorf("no certificate: %+v", c)
	}
}

func TestRandomRequestsOverTLS(t *testing.T) {
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(true, false)
	both(t, func(t *testing.T, structured bool) {
		for name, d := range map[string]func() *Server{
			"memory": func() *Server { return &Server{Exports: static(t, Export{Disk: newMemDisk(diskSize)})} },
			"file":   func() *Server { return &Server{Exports: static(t, Export{Disk: newFileDisk(t, diskSize)})} },
		} {
			t.Run(name, func(t *testing.T) {
				s := d()
				s.Workers, s.TLS = 4, with
				socket, _ := start(t, s)
				p := dial(t, "unix", socket)
				p.hello(3)
				if err := p.upgrade(ca.client(nil)); err != nil {
					t.Fatal(err)
				}
				if structured {
					p.option(optStructuredReply)
				}
				if k := last(p.option(optGo, goData(""))); k != repAck {
					t.Fatalf("GO: %#x", k)
				}
				randomRequestsTo(t, p, diskSize, structured)
			})
		}
	})
}

func TestStopEndsTLSConnectionsInOrder(t *testing.T) {
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(true, false)
	s := twoExports(t)
	s.TLS = with
	socket, stop := start(t, s)
	var peers []*peer
	for range 3 {
		p := dial(t, "unix", socket)
		p.hello(3)
		if err := p.upgrade(ca.client(nil)); err != nil {
			t.Fatal(err)
		}
		peers = append(peers, p)
	}
	if k := last(peers[0].option(optGo, goData("a"))); k != repAck {
		t.Fatalf("GO: %#x", k)
	}
	begin := time.Now()
	stop()
	if d := time.Since(begin); d > DefaultDrainTimeout/2 {
		t.Errorf("stop took %v", d)
	}
	for _, p := range peers {
		// io.EOF from TLS, and not an error, is its orderly end.
		if n, err := p.Read(make([]byte, 1)); n != 0 || err == nil || err.Error() != "EOF" {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
}

// TLS writes when it reads a request for new keys, maybe long after the last
// reply: the deadline of that one must not stop it.
func TestDeadlineOfTLSIsNotThatOfTheLastReply(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	from, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = from.Close() }()
	g := &gathering{Conn: from, timeout: 20 * time.Millisecond}
	for range 3 {
		if _, err := g.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * g.timeout)
	}
	if _, err := g.Write(make([]byte, 16<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody reads: %v", err)
	}
	if err := g.SetWriteDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * g.timeout)
	if _, err := g.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after TLS has set its last deadline: %v", err)
	}
}

func TestClientThatTakesNoRepliesIsCutOffOverTLS(t *testing.T) {
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(true, false)
	s := &Server{Exports: static(t, Export{Disk: newMemDisk(64 << 20)}), TLS: with, WriteTimeout: 100 * time.Millisecond}
	socket, stop := start(t, s)
	p := dial(t, "unix", socket)
	p.hello(3)
	if err := p.upgrade(ca.client(nil)); err != nil {
		t.Fatal(err)
	}
	p.option(optGo, goData(""))
	for i := range uint64(4) {
		p.request(0, cmdRead, i, 0, 16<<20)
	}
	eventually(t, "it is cut off", func() bool { return connections(s) == 0 })
	stop()
}

// lines is a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestCertificatesAreReadAgainWhenTheyChange(t *testing.T) {
	ca, next := newAuthority(t, "ca"), newAuthority(t, "next")
	first := ca.issue("localhost", nil)
	dir := ca.folder("server", &first)
	log := &lines{}
	certs, err := LoadCertificates(dir, true, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	_, socket := tlsServer(t, &TLS{Required: true, Config: certs.Config})
	mine, other := ca.issue("me", nil), next.issue("me", nil)
	var shown *tls.Certificate // by the server
	try := func(trust *authority, c *tls.Certificate) error {
		p := dial(t, "unix", socket)
		p.hello(3)
		config := trust.client(nil)
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c, nil }
		err := p.upgrade(config)
		if err == nil {
			shown = &tls.Certificate{Leaf: p.Conn.(*tls.Conn).ConnectionState().PeerCertificates[0]}
		}
		return err
	}
	if err := try(ca, &mine); err != nil || !shown.Leaf.Equal(first.Leaf) {
		t.Fatalf("at first: %v", err)
	}
	held := dial(t, "unix", socket)
	held.hello(3)
	if err := held.upgrade(ca.client(&mine)); err != nil {
		t.Fatal(err)
	}

	second := ca.issue("localhost", nil)
	putPair(t, dir, "server", second)
	if err := try(ca, &mine); err != nil || !shown.Leaf.Equal(second.Leaf) {
		t.Errorf("renewed: %v, shown %v", err, shown.Leaf.SerialNumber)
	}

	// Half of a renewal, then rubbish: what was there stays in force.
	third := next.issue("localhost", nil)
	putPair(t, dir, "half", third)
	if err := os.Rename(filepath.Join(dir, "half-cert.pem"), filepath.Join(dir, certFile)); err != nil {
		t.Fatal(err)
	}
	if err := try(ca, &mine); err != nil || !shown.Leaf.Equal(second.Leaf) {
		t.Errorf("half renewed: %v", err)
	}
	if got := log.String(); !strings.Contains(got, "not used") {
		t.Errorf("the log says nothing: %s", got)
	}
	put(t, dir, keyFile, []byte("rubbish"))
	if err := try(ca, &mine); err != nil || !shown.Leaf.Equal(second.Leaf) {
		t.Errorf("rubbish: %v", err)
	}
	putPair(t, dir, "server", third)
	put(t, dir, caFile, next.pem())
	if err := try(next, &other); err != nil || !shown.Leaf.Equal(third.Leaf) {
		t.Errorf("other authority: %v", err)
	}
	if err := try(next, &mine); err == nil {
		t.Error("a client of the authority that was replaced still gets in")
	}
	put(t, dir, crlFile, next.revoke(time.Now().Add(time.Hour), other))
	if err := try(next, &other); err == nil {
		t.Error("a client that was revoked still gets in")
	}
	put(t, dir, crlFile, next.revoke(time.Now().Add(time.Hour)))
	if err := try(next, &other); err != nil {
		t.Errorf("nobody is revoked: %v", err)
	}
	put(t, dir, crlFile, next.revoke(time.Now().Add(-time.Second)))
	if err := try(next, &other); err == nil {
		t.Error("a list that is out of date is believed")
	}
	put(t, dir, crlFile, ca.revoke(time.Now().Add(time.Hour)))
	before := log.String()
	if err := try(next, &other); err == nil || !strings.Contains(strings.TrimPrefix(log.String(), before), "no authority") {
		t.Errorf("a list of somebody else: %v", err)
	}
	if k := last(held.option(optList)); k != repAck {
		t.Errorf("the connection from before: %#x", k)
	}
}

func TestFoldersOfCertificatesThatAreWrong(t *testing.T) {
	ca := newAuthority(t, "ca")
	good, old := ca.issue("localhost", nil), ca.issue("localhost", expired)
	discard := slog.New(slog.DiscardHandler)
	for name, c := range map[string]struct {
		spoil  func(dir string)
		verify bool
		want   string // "" is no error
	}{
		"good":                {func(string) {}, true, ""},
		"empty":               {func(dir string) { _ = os.RemoveAll(dir); _ = os.Mkdir(dir, 0o700) }, true, "no such file"},
		"no authority":        {func(dir string) { _ = os.Remove(filepath.Join(dir, caFile)) }, true, caFile},
		"no authority needed": {func(dir string) { _ = os.Remove(filepath.Join(dir, caFile)) }, false, ""},
		"authority is no PEM": {func(dir string) { put(t, dir, caFile, []byte("x")) }, false, "no PEM block"},
		"authority is rubbish": {func(dir string) {
			put(t, dir, caFile, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
		}, true, caFile},
		"expired":                 {func(dir string) { putPair(t, dir, "server", old) }, true, "is valid from"},
		"keys instead":            {func(dir string) { _ = os.Remove(filepath.Join(dir, certFile)); put(t, dir, pskFile, []byte("me:00")) }, true, "pre-shared keys"},
		"list of revoked is none": {func(dir string) { put(t, dir, crlFile, []byte("x")) }, true, crlFile},
	} {
		t.Run(name, func(t *testing.T) {
			dir := ca.folder("server", &good)
			c.spoil(dir)
			_, err := LoadCertificates(dir, c.verify, discard)
			if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, ErrCertificates) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestTLSThatIsNotAvailableIsSaid(t *testing.T) {
	_, socket := tlsServer(t, &TLS{Config: func() (*tls.Config, error) { return nil, context.DeadlineExceeded }})
	p := dial(t, "unix", socket)
	p.hello(3)
	if k := last(p.option(optStartTLS)); k != repErrPolicy {
		t.Errorf("STARTTLS: %#x", k)
	}
	if k := last(p.option(optGo, goData("a"))); k != repAck {
		t.Errorf("GO in plain text: %#x", k)
	}
}
