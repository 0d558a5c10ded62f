package nbd

import (
	"context"
	"iter"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/restore"
)

// solid is a file without holes: nobody has to look for them.
type solid struct{ *fileDisk }

func (d solid) Extents(_ context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) { yield(restore.Extent{Off: off, Len: n}, nil) }
}

// BenchmarkCopy has nbdcopy read a file of 512 MiB from our server and from
// qemu-nbd, in plain text and over TLS, with four connections and with one.
func BenchmarkCopy(b *testing.B) {
	const size = 512 << 20
	for _, p := range []string{"nbdcopy", "qemu-nbd"} {
		if _, err := exec.LookPath(p); err != nil {
			b.Skipf("SKIPPED: %v", err)
		}
	}
	dir, err := os.MkdirTemp("/dev/shm", "tidemark-bench-")
	if err != nil {
		b.Skipf("SKIPPED: %v", err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := filepath.Join(dir, "disk")
	if err := os.WriteFile(file, pattern(size, 1), 0o600); err != nil {
		b.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = f.Close() })
	ca := newAuthority(b, "ca")
	with, certs := ca.serverTLS(true, true)
	mine := ca.issue("me", nil)
	q := "&tls-certificates=" + url.QueryEscape(ca.folder("client", &mine))
	exports := static(b, Export{Disk: solid{&fileDisk{f: f, size: size}}, ReadOnly: true})
	plainSocket, _ := start(b, &Server{Exports: exports})
	tlsSocket, _ := start(b, &Server{Exports: exports, TLS: with})
	qemu := func(name string, extra ...string) string {
		socket := filepath.Join(dir, name)
		cmd := exec.CommandContext(b.Context(), "qemu-nbd", append([]string{"-k", socket, "-t", "-r", "-e", "16", "-f", "raw", "--cache=writeback", "--aio=threads", file}, extra...)...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		eventually(b, "qemu-nbd serves", func() bool { _, err := os.Stat(socket); return err == nil })
		return socket
	}
	qemuPlain := qemu("plain")
	qemuTLS := qemu("tls", "--object", "tls-creds-x509,id=t,endpoint=server,dir="+certs+",verify-peer=on", "--tls-creds", "t")
	for _, c := range []struct{ name, uri string }{
		{"plain/tidemark", "nbd+unix:///?socket=" + plainSocket},
		{"plain/qemu-nbd", "nbd+unix:///?socket=" + qemuPlain},
		{"TLS/tidemark", "nbds+unix:///?socket=" + tlsSocket + q},
		{"TLS/qemu-nbd", "nbds+unix:///?socket=" + qemuTLS + q},
	} {
		for _, conns := range []string{"4", "1"} {
			b.Run(c.name+"/connections="+conns, func(b *testing.B) {
				b.SetBytes(size)
				for b.Loop() {
					if out, err := exec.CommandContext(b.Context(), "nbdcopy", "--connections="+conns, c.uri, "null:").CombinedOutput(); err != nil {
						b.Fatalf("%v: %s", err, out)
					}
				}
			})
		}
	}
}
