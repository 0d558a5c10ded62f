package nbd

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/restore"
)

// need skips the test, loudly, if a program is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("SKIPPED, an independent client is missing: %v", err)
		}
	}
}

func run1(t *testing.T, program string, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Dir = t.TempDir()
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", program, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String()
}

// endpoints serves s on a unix socket and on TCP and returns a function of an
// export's name to its URI for each.
func endpoints(t *testing.T, s *Server) map[string]func(name string) string {
	t.Helper()
	socket, _ := start(t, s)
	l, err := Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	startListener(t, s, l)
	return map[string]func(string) string{
		"unix": func(name string) string { return "nbd+unix:///" + name + "?socket=" + socket },
		"tcp":  func(name string) string { return "nbd://" + l.Addr().String() + "/" + name },
	}
}

// sparse writes runs of data with holes between them, and returns it all.
func sparse(t testing.TB, d restore.WritableDisk) []byte {
	t.Helper()
	all := make([]byte, d.Size())
	for i, off := range []int64{0, 1 << 20, 3<<20 + 4096, 20 << 20, d.Size() - 64<<10} {
		data := pattern((i%3+1)*64<<10, byte(i))
		data = data[:min(int64(len(data)), d.Size()-off)]
		if _, err := d.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
		copy(all[off:], data)
	}
	return all
}

func content(t testing.TB, d restore.Disk) [32]byte {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(d, 0, d.Size())); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

func TestNbdinfo(t *testing.T) {
	need(t, "nbdinfo")
	d := newMemDisk(32 << 20)
	sparse(t, d)
	s := &Server{Exports: static(t,
		Export{Name: "one", Description: "first of two", Disk: d},
		Export{Name: "two", Disk: d, ReadOnly: true})}
	for network, uri := range endpoints(t, s) {
		t.Run(network, func(t *testing.T) {
			var info struct {
				Protocol   string
				TLS        bool
				Structured bool
				Exports    []struct {
					Name           string `json:"export-name"`
					Description    string
					Size           int64 `json:"export-size"`
					ReadOnly       bool  `json:"is_read_only"`
					Multi          bool  `json:"can_multi_conn"`
					FastZero       bool  `json:"can_fast_zero"`
					Trim           bool  `json:"can_trim"`
					Contexts       []string
					Preferred, Max int64
					BlockPreferred int64 `json:"block_size_preferred"`
					BlockMax       int64 `json:"block_size_maximum"`
				}
			}
			if err := json.Unmarshal([]byte(run1(t, "nbdinfo", "--json", "--list", uri(""))), &info); err != nil {
				t.Fatal(err)
			}
			if info.Protocol != "newstyle-fixed" || !info.Structured || len(info.Exports) != 2 {
				t.Fatalf("%+v", info)
			}
			one, two := info.Exports[0], info.Exports[1]
			if one.Name != "one" || one.Description != "first of two" || one.Size != 32<<20 || one.ReadOnly || !one.Multi || !one.FastZero || !one.Trim {
				t.Errorf("%+v", one)
			}
			if one.BlockPreferred != 4096 || one.BlockMax != maxPayload || fmt.Sprint(one.Contexts) != "[base:allocation qemu:allocation-depth]" {
				t.Errorf("%+v", one)
			}
			if two.Name != "two" || !two.ReadOnly || two.Trim || two.BlockPreferred != 64<<10 {
				t.Errorf("%+v", two)
			}

			var extents []struct{ Offset, Length, Type int64 }
			if err := json.Unmarshal([]byte(run1(t, "nbdinfo", "--map", "--json", uri("two"))), &extents); err != nil {
				t.Fatal(err)
			}
			at := int64(0)
			for i, e := range extents {
				if e.Offset != at || e.Type != int64(i%2*3) {
					t.Errorf("extent %d: %+v at %d", i, e, at)
				}
				at += e.Length
			}
			if at != 32<<20 || len(extents) < 8 {
				t.Errorf("%d extents up to %d", len(extents), at)
			}
		})
	}
}

func TestNbdClientLists(t *testing.T) {
	const client = "/usr/sbin/nbd-client" // not in everybody's PATH
	need(t, client)
	l, err := Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	startListener(t, twoExports(t), l)
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if out := run1(t, client, "-l", "127.0.0.1", port); !strings.Contains(out, "a\nb\n") && !strings.Contains(out, "a: ") {
		t.Errorf("%q", out)
	}
}

func TestNbdcopyBothDirections(t *testing.T) {
	need(t, "nbdcopy")
	from, to := newFileDisk(t, 32<<20), newMemDisk(32<<20)
	overwritten := pattern(32<<20, 77)
	s := &Server{Exports: static(t,
		Export{Name: "from", Disk: from, ReadOnly: true},
		Export{Name: "slow", Disk: slow(plain{from}), ReadOnly: true},
		Export{Name: "to", Disk: to})}
	all := sparse(t, from)
	for network, uri := range endpoints(t, s) {
		for _, source := range []string{"from", "slow"} {
			t.Run(network+"/"+source, func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "image")
				run1(t, "nbdcopy", uri(source), file)
				got, err := os.ReadFile(file)
				if err != nil || !bytes.Equal(got, all) {
					t.Errorf("copied out: wrong data, %v", err)
				}
				if _, err := to.WriteAt(overwritten, 0); err != nil { // holes must arrive as zeroes
					t.Fatal(err)
				}
				run1(t, "nbdcopy", "--flush", file, uri("to"))
				if content(t, to) != sha256.Sum256(all) {
					t.Error("copied in: wrong data")
				}
				if _, err := to.WriteAt(overwritten, 0); err != nil {
					t.Fatal(err)
				}
				run1(t, "nbdcopy", "--flush", uri(source), uri("to"))
				if content(t, to) != sha256.Sum256(all) {
					t.Error("copied from export to export: wrong data")
				}
			})
		}
	}
}

func TestQemuImg(t *testing.T) {
	need(t, "qemu-img")
	from, to := newFileDisk(t, 32<<20), newMemDisk(32<<20)
	all := sparse(t, from)
	s := &Server{Exports: static(t, Export{Name: "from", Disk: from, ReadOnly: true}, Export{Name: "to", Disk: to})}
	for network, uri := range endpoints(t, s) {
		t.Run(network, func(t *testing.T) {
			if out := run1(t, "qemu-img", "info", "-f", "raw", uri("from")); !strings.Contains(out, "32 MiB") {
				t.Errorf("info: %s", out)
			}
			dir := t.TempDir()
			qcow := filepath.Join(dir, "image.qcow2")
			run1(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri("from"), qcow)
			if st, err := os.Stat(qcow); err != nil || st.Size() > 2<<20 {
				t.Errorf("qcow2 image is not sparse: %v, %v", st.Size(), err)
			}
			run1(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow, uri("from"))
			if _, err := to.WriteAt(pattern(32<<20, 77), 0); err != nil {
				t.Fatal(err)
			}
			run1(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow, uri("to"))
			if content(t, to) != sha256.Sum256(all) {
				t.Error("converted into the export: wrong data")
			}
			run1(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri("from"), uri("to"))
			var extents []struct {
				Start, Length int64
				Zero, Data    bool
			}
			if err := json.Unmarshal([]byte(run1(t, "qemu-img", "map", "-f", "raw", "--output=json", uri("from"))), &extents); err != nil {
				t.Fatal(err)
			}
			zero := int64(0)
			for _, e := range extents {
				if e.Zero {
					zero += e.Length
				}
			}
			if zero < 30<<20 {
				t.Errorf("map shows %d zero bytes: %+v", zero, extents)
			}
		})
	}
}

func TestQemuIO(t *testing.T) {
	need(t, "qemu-io")
	for network, uri := range endpoints(t, &Server{Exports: static(t,
		Export{Name: "mem", Disk: newMemDisk(16 << 20)},
		Export{Name: "file", Disk: newFileDisk(t, 16<<20)},
		Export{Name: "ro", Disk: newMemDisk(16 << 20), ReadOnly: true})}) {
		for _, name := range []string{"mem", "file"} {
			t.Run(network+"/"+name, func(t *testing.T) {
				out := run1(t, "qemu-io", "-f", "raw", "-t", "none",
					"-c", "write -P 0xa5 0 2M", "-c", "flush", "-c", "read -P 0xa5 0 2M",
					"-c", "write -f -P 0x11 1000k 8k", "-c", "read -P 0x11 1000k 8k", "-c", "read -P 0xa5 1008k 16k",
					"-c", "write -z 512k 64k", "-c", "read -P 0 512k 64k",
					"-c", "write -z -u 128k 128k", "-c", "read -P 0 128k 128k",
					"-c", "write -z -f 1M 64k", "-c", "read -P 0 1M 64k",
					"-c", "discard 1536k 64k", "-c", "read 1536k 64k",
					"-c", "aio_write -P 7 4M 1M", "-c", "aio_write -P 8 5M 1M", "-c", "aio_write -P 9 6M 1M", "-c", "aio_flush",
					"-c", "read -P 7 4M 1M", "-c", "read -P 8 5M 1M", "-c", "read -P 9 6M 1M", "-c", "flush",
					uri(name))
				if strings.Contains(out, "verification failed") || strings.Contains(out, "error") {
					t.Errorf("%s", out)
				}
			})
		}
		t.Run(network+"/read-only", func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "qemu-io", "-f", "raw", "-c", "write 0 4k", uri("ro"))
			if out, err := cmd.CombinedOutput(); err == nil {
				t.Errorf("qemu wrote to a read-only export: %s", out)
			}
		})
	}
}

func TestFioVerifies(t *testing.T) {
	need(t, "fio")
	if out, err := exec.CommandContext(t.Context(), "fio", "--enghelp=nbd").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, fio has no nbd engine: %s", out)
	}
	for network, uri := range endpoints(t, &Server{Exports: static(t,
		Export{Name: "mem", Disk: newMemDisk(16 << 20)},
		Export{Name: "file", Disk: newFileDisk(t, 16<<20)},
		Export{Name: "slow", Disk: slow(newMemDisk(16 << 20))})}) {
		for _, name := range []string{"mem", "file", "slow"} {
			t.Run(network+"/"+name, func(t *testing.T) {
				run1(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri(name), "--rw=randwrite", "--bsrange=512-192k",
					"--blockalign=512", "--size=16M", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--fsync=64",
					"--randseed=7", "--output-format=terse")
			})
		}
	}
}

func TestLibnbdRawCommands(t *testing.T) {
	need(t, "/usr/bin/python3")
	if out, err := exec.CommandContext(t.Context(), "/usr/bin/python3", "-c", "import nbd").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, no libnbd for Python: %s", out)
	}
	const script = `
import nbd, errno, sys
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(sys.argv[1])
h.set_strict_mode(0)          # we want to send what is wrong, too
size = h.get_size()
assert h.get_structured_replies_negotiated()
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
def fails(code, f, *args, **kw):
    try:
        f(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == code, (e.errnum, e.string)
        return
    raise AssertionError("no error from %r" % (args,))
h.pwrite(b"\x55" * 70000, 12345)
assert h.pread(70000, 12345) == b"\x55" * 70000
h.pwrite(b"\x66" * 512, 0, flags=nbd.CMD_FLAG_FUA)
fails(errno.ENOSPC, h.pwrite, b"x" * 512, size - 511)
fails(errno.EINVAL, h.pread, 512, size - 511)
fails(errno.EINVAL, h.pread, (32 << 20) + 1, 0)
fails(errno.EINVAL, h.trim, 512, size - 511)
fails(errno.ENOSPC, h.zero, 512, size - 511)
fails(errno.EINVAL, h.block_status, 0, 0, lambda *a: 0)
fails(errno.ENOTSUP, h.zero, 512, 0, flags=nbd.CMD_FLAG_FAST_ZERO)
h.zero(size, 0)
assert h.pread(512, 0) == bytes(512)
h.zero(65536, 65536, flags=nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 0); h.cache(size, 0); h.flush()
entries = []
h.block_status(size, 0, lambda ctx, off, e, err: entries.extend(e) and 0)
assert sum(entries[0::2]) == size, entries
assert entries == [65536, 3, 65536, 0, size - 131072, 3], entries
one = []
h.block_status(size, 0, lambda ctx, off, e, err: one.extend(e) and 0, flags=nbd.CMD_FLAG_REQ_ONE)
assert one == [65536, 3], one
chunks = []
h.pwrite(b"\x77" * 65536, 1 << 20)
buf = h.pread_structured(2 << 20, 0, lambda buf, off, status, err: chunks.append(status) and 0)
assert nbd.READ_HOLE in chunks and nbd.READ_DATA in chunks and nbd.READ_ERROR not in chunks, chunks
chunks.clear()
h.pread_structured(2 << 20, 0, lambda buf, off, status, err: chunks.append(status) and 0, flags=nbd.CMD_FLAG_DF)
assert chunks == [nbd.READ_DATA], chunks
# A second export over the same connection attempt: unknown names are refused before the known one is taken.
g = nbd.NBD()
g.set_opt_mode(True)
g.connect_uri(sys.argv[1])
names = []
g.opt_list(lambda name, description: names.append(name) and 0)
assert names == ["disk"], names
g.set_export_name("missing")
fails(errno.ENOENT, g.opt_info)
fails(errno.ENOENT, g.opt_go)
g.set_export_name("disk")
g.opt_go()
assert g.get_size() == size
g.shutdown(); h.shutdown()
print("ok")
`
	for network, uri := range endpoints(t, &Server{Exports: static(t, Export{Name: "disk", Disk: newMemDisk(40 << 20)})}) {
		t.Run(network, func(t *testing.T) {
			if out := run1(t, "/usr/bin/python3", "-c", script, uri("disk")); out != "ok\n" {
				t.Errorf("%s", out)
			}
		})
	}
}
