package nbd

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// secure is a server with TLS on a unix socket and on TCP, and what clients need.
type secure struct {
	*authority
	socket, address string
	log             *lines
}

func startSecure(t *testing.T, s *Server, required bool) *secure {
	t.Helper()
	x := &secure{authority: newAuthority(t, "ca"), log: &lines{}}
	s.TLS, _ = x.serverTLS(required, true)
	s.Log = slog.New(slog.NewTextHandler(x.log, nil))
	x.socket, _ = start(t, s)
	x.address = startTCP(t, s)
	return x
}

// as is a folder for a client.
func (x *secure) as(c tls.Certificate) string { return x.folder("client", &c) }

// uris are those that libnbd takes, by network, with the folder of a client.
func (x *secure) uris(name, dir string) map[string]string {
	q := "tls-certificates=" + url.QueryEscape(dir)
	return map[string]string{
		"tcp":  "nbds://" + x.address + "/" + name + "?" + q,
		"unix": "nbds+unix:///" + name + "?socket=" + url.QueryEscape(x.socket) + "&" + q,
	}
}

// qemu are the arguments with which QEMU's tools reach an export.
func (x *secure) qemu(network, name, dir string) []string {
	at := "server.type=unix,server.path=" + x.socket
	if network == "tcp" {
		host, port, _ := net.SplitHostPort(x.address)
		at = "server.type=inet,server.host=" + host + ",server.port=" + port
	}
	return []string{"--object", "tls-creds-x509,id=t,endpoint=client,dir=" + dir, "--image-opts",
		"driver=raw,file.driver=nbd,file.export=" + name + ",file.tls-creds=t,file.tls-hostname=localhost,file." + strings.ReplaceAll(at, ",", ",file.")}
}

// fails runs a program that must fail, and returns what it says.
func fails(t *testing.T, program string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("%s %s succeeds: %s", program, strings.Join(args, " "), out)
	}
	return string(out)
}

func TestTLSWithLibnbdAndQEMU(t *testing.T) {
	need(t, "nbdinfo", "nbdcopy", "qemu-img", "qemu-nbd")
	from, to := newFileDisk(t, 32<<20), newMemDisk(32<<20)
	all := sparse(t, from)
	x := startSecure(t, &Server{Exports: static(t, Export{Name: "from", Disk: from, ReadOnly: true}, Export{Name: "to", Disk: to})}, true)
	dir := x.as(x.issue("standby1", nil))
	for _, network := range []string{"tcp", "unix"} {
		t.Run("libnbd/"+network, func(t *testing.T) {
			var info struct {
				TLS     bool
				Exports []struct {
					Name string `json:"export-name"`
				}
			}
			if err := json.Unmarshal([]byte(run1(t, "nbdinfo", "--json", "--list", x.uris("", dir)[network])), &info); err != nil {
				t.Fatal(err)
			}
			if !info.TLS || len(info.Exports) != 2 {
				t.Errorf("%+v", info)
			}
			file := filepath.Join(t.TempDir(), "image")
			run1(t, "nbdcopy", x.uris("from", dir)[network], file)
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, all) {
				t.Errorf("copied out: wrong data, %v", err)
			}
			if _, err := to.WriteAt(pattern(32<<20, 77), 0); err != nil {
				t.Fatal(err)
			}
			run1(t, "nbdcopy", "--flush", file, x.uris("to", dir)[network])
			if content(t, to) != sha256.Sum256(all) {
				t.Error("copied in: wrong data")
			}
		})
		t.Run("qemu/"+network, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "image")
			run1(t, "qemu-img", append(append([]string{"convert"}, x.qemu(network, "from", dir)...), "-O", "raw", file)...)
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, all) {
				t.Errorf("converted: wrong data, %v", err)
			}
			if out := run1(t, "qemu-img", append([]string{"map", "--output=json"}, x.qemu(network, "from", dir)...)...); strings.Count(out, `"zero": true`) < 3 {
				t.Errorf("no holes: %s", out)
			}
			run1(t, "qemu-io", append([]string{"-c", "write -P 0xa5 0 2M", "-c", "flush", "-c", "read -P 0xa5 0 2M"}, x.qemu(network, "to", dir)...)...)
		})
	}
	t.Run("qemu-nbd", func(t *testing.T) { // takes from us, with TLS, and serves on without
		socket := filepath.Join(t.TempDir(), "s")
		cmd := exec.CommandContext(t.Context(), "qemu-nbd", append([]string{"-k", socket, "-r"}, x.qemu("tcp", "from", dir)...)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "qemu-nbd serves", func() bool { _, err := os.Stat(socket); return err == nil })
		file := filepath.Join(t.TempDir(), "image")
		run1(t, "nbdcopy", "nbd+unix:///?socket="+socket, file)
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, all) {
			t.Errorf("wrong data, %v", err)
		}
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
}

func TestTLSRefusalsWithLibnbdAndQEMU(t *testing.T) {
	need(t, "nbdinfo", "qemu-img")
	x := startSecure(t, &Server{Exports: static(t, Export{Name: "a", Disk: newMemDisk(1 << 20)})}, true)
	other := newAuthority(t, "ca")
	foreign, mine, old := other.issue("x", nil), x.issue("x", nil), x.issue("x", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	mixed := x.folder("client", &foreign) // trusts the server, is not trusted
	for name, dir := range map[string]string{
		"server not trusted": other.folder("client", &foreign),
		"client not trusted": mixed,
		"no certificate":     x.folder("client", nil),
		"expired":            x.as(old),
	} {
		t.Run(name, func(t *testing.T) {
			for network, uri := range x.uris("a", dir) {
				if name != "server not trusted" || network != "unix" { // where libnbd 1.14 verifies nothing
					t.Logf("nbdinfo: %s", fails(t, "nbdinfo", uri))
				}
				t.Logf("qemu-img: %s", fails(t, "qemu-img", append([]string{"info"}, x.qemu(network, "a", dir)...)...))
			}
		})
	}
	t.Run("plain", func(t *testing.T) {
		for _, uri := range []string{"nbd://" + x.address + "/a", "nbd+unix:///a?socket=" + x.socket} {
			for program, args := range map[string][]string{"nbdinfo": {uri}, "qemu-img": {"info", "-f", "raw", uri}} {
				if out := fails(t, program, args...); !strings.Contains(out, "TLS") {
					t.Errorf("%s does not say that TLS is required: %s", program, out)
				} else {
					t.Logf("%s: %s", program, out)
				}
			}
		}
	})
	good := x.as(mine)
	t.Run("host name", func(t *testing.T) {
		_, port, _ := net.SplitHostPort(x.address)
		args := []string{"info", "--object", "tls-creds-x509,id=t,endpoint=client,dir=" + good, "--image-opts",
			"driver=nbd,export=a,tls-creds=t,tls-hostname=elsewhere.example.org,server.type=inet,server.host=127.0.0.1,server.port=" + port}
		t.Logf("qemu-img: %s", fails(t, "qemu-img", args...))
		elsewhere := "127.0.0.2:" + port // the certificate is for 127.0.0.1
		l, err := Listen(t.Context(), "tcp", elsewhere)
		if err != nil {
			t.Fatal(err)
		}
		s := twoExports(t)
		s.TLS, _ = x.serverTLS(true, true)
		startListener(t, s, l)
		t.Logf("nbdinfo: %s", fails(t, "nbdinfo", "nbds://"+elsewhere+"/a?tls-certificates="+url.QueryEscape(good)))
	})
	for network, uri := range x.uris("a", good) { // it is not the server that is broken
		run1(t, "nbdinfo", uri)
		run1(t, "qemu-img", append([]string{"info"}, x.qemu(network, "a", good)...)...)
	}
	if !strings.Contains(x.log.String(), "connection cut off") {
		t.Errorf("refusals are not logged: %s", x.log)
	}
}

func TestOptionalTLSWithLibnbdAndQEMU(t *testing.T) {
	need(t, "nbdinfo", "qemu-img")
	rule, err := ParseRule("CN=standby1:secret*")
	if err != nil {
		t.Fatal(err)
	}
	all, err := ParseRule("*:public*")
	if err != nil {
		t.Fatal(err)
	}
	exports := static(t, Export{Name: "secret", Disk: newMemDisk(1 << 20)}, Export{Name: "public", Disk: newMemDisk(1 << 20)})
	x := startSecure(t, &Server{Exports: Restrict(exports, rule, all)}, false)
	known, unknown := x.as(x.issue("standby1", nil)), x.as(x.issue("standby2", nil))
	plain := "nbd://" + x.address + "/"
	if out := run1(t, "nbdinfo", "--list", plain); strings.Contains(out, "secret") || !strings.Contains(out, "public") {
		t.Errorf("plain: %s", out)
	}
	if out := run1(t, "nbdinfo", "--list", x.uris("", unknown)["tcp"]); strings.Contains(out, "secret") || !strings.Contains(out, "public") {
		t.Errorf("another certificate: %s", out)
	}
	if out := run1(t, "nbdinfo", "--list", x.uris("", known)["tcp"]); !strings.Contains(out, "secret") || !strings.Contains(out, "public") {
		t.Errorf("the certificate: %s", out)
	}
	run1(t, "qemu-img", "info", "-f", "raw", plain+"public")
	run1(t, "qemu-img", append([]string{"info"}, x.qemu("unix", "secret", known)...)...)
	for _, out := range []string{fails(t, "qemu-img", append([]string{"info"}, x.qemu("unix", "secret", unknown)...)...), fails(t, "qemu-img", "info", "-f", "raw", plain+"secret")} {
		if !strings.Contains(out, "no such export") {
			t.Errorf("%s", out)
		}
	}
}

// Libnbd asks for TLS in the middle of the options, and starts anew then.
func TestLibnbdStartsTLSInTheMiddle(t *testing.T) {
	need(t, "/usr/bin/python3")
	if out, err := exec.CommandContext(t.Context(), "/usr/bin/python3", "-c", "import nbd").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, no libnbd for Python: %s", out)
	}
	const script = `
import nbd, sys
h = nbd.NBD()
if not hasattr(h, "opt_starttls"):
    print("too old"); sys.exit()
h.set_opt_mode(True)
h.set_request_structured_replies(False)
h.set_tls_certificates(sys.argv[2]); h.set_tls_verify_peer(True)
h.connect_unix(sys.argv[1])
names = []
h.opt_list(lambda name, description: names.append(name) and 0)
assert h.opt_starttls() and h.get_tls_negotiated()
h.opt_list(lambda name, description: names.append(name) and 0)
assert names == ["a", "b", "a", "b"], names
h.opt_structured_reply(); h.set_export_name("a"); h.opt_go()
h.pwrite(b"x" * 100000, 5); assert h.pread(100000, 5) == b"x" * 100000
h.shutdown(); print("ok")
`
	x := startSecure(t, twoExports(t), false)
	if out := run1(t, "/usr/bin/python3", "-c", script, x.socket, x.as(x.issue("me", nil))); out == "too old\n" {
		t.Skip("SKIPPED, this libnbd has no nbd_opt_starttls (1.16)")
	} else if out != "ok\n" {
		t.Errorf("%s", out)
	}
}
