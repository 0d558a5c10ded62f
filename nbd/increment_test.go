package nbd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// pullDirty is a backup tool as others write them with libnbd: it reads what a dirty
// bitmap names and nothing else, over a copy of the older state.
const pullDirty = `
import nbd, sys
uri, context, copy = sys.argv[1:]
h = nbd.NBD()
h.add_meta_context(context)
h.connect_uri(uri)
assert h.can_meta_context(context), context
off, pulled = 0, 0
size = h.get_size()
with open(copy, "r+b") as out:
    out.truncate(size)
    while off < size:
        entries = []
        h.block_status(count=size - off, offset=off, extent=lambda c, o, e, err: entries.extend(e) and 0)
        for n, dirty in zip(entries[0::2], entries[1::2]):
            if dirty:
                out.seek(off)
                out.write(h.pread(n, off))
                pulled += n
            off += n
h.shutdown()
print(pulled)
`

func needLibnbd(t *testing.T) {
	t.Helper()
	need(t, "/usr/bin/python3")
	if out, err := exec.CommandContext(t.Context(), "/usr/bin/python3", "-c", "import nbd").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, no libnbd for Python: %s", out)
	}
}

// pull applies the increment to a copy of was and returns the result, and how many
// bytes came.
func pull(t *testing.T, uri, context string, was []byte) (now []byte, pulled string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "copy")
	if err := os.WriteFile(file, was, 0o600); err != nil {
		t.Fatal(err)
	}
	out := run1(t, "/usr/bin/python3", "-c", pullDirty, uri, context, file)
	now, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return now, strings.TrimSpace(out)
}

func TestIncrementsWithOtherPeoplesTools(t *testing.T) {
	needLibnbd(t)
	need(t, "nbdinfo", "qemu-img", "qemu-nbd", "qemu-io")
	repo, _ := disktest.Repo(t)
	images := vmImages(5)
	grown := append(bytes.Clone(images[2]), pattern(700_416, 9)...)
	points := publishVM(t, repo, "vm", append(images, grown))
	images = append(images, grown)
	catalog := restore.NewCatalog(repo, restore.NewCache(1<<20))
	socket, _ := start(t, &Server{Exports: NewPoints(catalog)})
	uri := func(name string) string { return "nbd+unix:///" + name + "?socket=" + socket }

	const grain = 64 << 10
	for _, c := range []struct {
		from, to int
		bytes    int // at most: whole grains
	}{{0, 1, 2 * grain}, {1, 2, grain}, {0, 2, 3 * grain}, {2, 3, 11 * grain}, {0, 3, 14 * grain}, {2, 0, 3 * grain}, {1, 1, 0}} {
		name, context := "vm@"+points[c.to].ID+"/disk0", contextDirty+points[c.from].ID
		now, pulled := pull(t, uri(name), context, images[c.from])
		if !bytes.Equal(now, images[c.to]) {
			t.Errorf("from point %d to %d: the copy is another disk", c.from, c.to)
		}
		var n int
		if _, err := fmt.Sscan(pulled, &n); err != nil || n > c.bytes || n == 0 && c.bytes > 0 {
			t.Errorf("from point %d to %d: %s bytes pulled, want %d", c.from, c.to, pulled, c.bytes)
		}
	}

	name, context := "vm@"+points[2].ID+"/disk0", contextDirty+points[0].ID
	dirty := fmt.Sprint([]int64{1, 2, 10, 11, 48, 49}) // grains: from, to, from, ...
	t.Run("nbdinfo", func(t *testing.T) {
		var extents []struct {
			Offset, Length, Type int64
			Description          string
		}
		if err := json.Unmarshal([]byte(run1(t, "nbdinfo", "--map="+context, "--json", uri(name))), &extents); err != nil {
			t.Fatal(err)
		}
		var got []int64
		for _, e := range extents {
			if e.Type == 1 && e.Description == "dirty" {
				got = append(got, e.Offset/grain, (e.Offset+e.Length)/grain)
			}
		}
		if fmt.Sprint(got) != dirty {
			t.Errorf("%v: %+v", got, extents)
		}
		if err := json.Unmarshal([]byte(run1(t, "nbdinfo", "--map=qemu:allocation-depth", "--json", uri(name))), &extents); err != nil {
			t.Fatal(err)
		}
		if extents[0].Type != 1 || extents[1].Type != 0 {
			t.Errorf("depth: %+v", extents)
		}
		var info struct {
			Exports []struct {
				Name        string `json:"export-name"`
				Description string
				Contexts    []string
				Multi       bool `json:"can_multi_conn"`
			}
		}
		if err := json.Unmarshal([]byte(run1(t, "nbdinfo", "--list", "--json", uri(""))), &info); err != nil {
			t.Fatal(err)
		}
		// The first is the latest, shown by its proper name.
		if len(info.Exports) != 5 || info.Exports[0].Name != "vm@"+points[3].ID+"/disk0" || info.Exports[0].Multi || info.Exports[1].Name != "vm@"+points[3].ID+"/disk0" || !info.Exports[1].Multi {
			t.Errorf("%+v", info.Exports)
		}
		if got := fmt.Sprint(info.Exports[3].Contexts); got != fmt.Sprint([]string{contextAllocation, contextDepth, contextDirty + points[0].ID}) {
			t.Errorf("contexts of the second point: %s", got)
		}
	})
	t.Run("qemu-img", func(t *testing.T) {
		var extents []struct {
			Start, Length int64
			Data          bool
		}
		options := "driver=nbd,server.type=unix,server.path=" + socket + ",export=" + name + ",x-dirty-bitmap=" + context
		if err := json.Unmarshal([]byte(run1(t, "qemu-img", "map", "--image-opts", options, "--output=json")), &extents); err != nil {
			t.Fatal(err)
		}
		var got []int64
		for _, e := range extents {
			if !e.Data { // so QEMU shows the bit
				got = append(got, e.Start/grain, (e.Start+e.Length)/grain)
			}
		}
		if fmt.Sprint(got) != dirty {
			t.Errorf("%v: %+v", got, extents)
		}
		copied := filepath.Join(t.TempDir(), "copy")
		run1(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri("vm@latest"), copied)
		if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, grown) {
			t.Errorf("the latest point is another: %v", err)
		}
	})
	t.Run("qemu-nbd", func(t *testing.T) {
		out := run1(t, "qemu-nbd", "--list", "--socket="+socket)
		for _, want := range []string{"exports available: 5", "export: 'vm@latest/disk0'", "export: '" + name + "'", contextDepth, context} {
			if !strings.Contains(out, want) {
				t.Errorf("%q is not in %s", want, out)
			}
		}
	})
	t.Run("overlay", func(t *testing.T) {
		p, err := catalog.Find(t.Context(), "vm@"+points[1].ID)
		if err != nil {
			t.Fatal(err)
		}
		base, closer, err := catalog.Open(t.Context(), p, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = closer.Close() }()
		ov, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "o"), base, "x")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ov.Close() }()
		socket, stop := start(t, &Server{Exports: static(t, Export{Name: "disk0", Disk: ov, History: NewHistory(catalog, p, "disk0")})})
		uri := "nbd+unix:///disk0?socket=" + socket
		run1(t, "qemu-io", "-f", "raw", "-c", "write -P 7 1M 4k", "-c", "write -z 1536k 64k", "-c", "flush", uri)
		want := bytes.Clone(images[1])
		copy(want[1<<20:], bytes.Repeat([]byte{7}, 4096))
		clear(want[1536<<10 : 1600<<10])
		for from, most := range map[int]int{0: 2*grain + 68<<10, 1: 68 << 10} {
			now, pulled := pull(t, uri, contextDirty+points[from].ID, images[from])
			if !bytes.Equal(now, want) {
				t.Errorf("since point %d: the copy is another disk", from)
			}
			if pulled != fmt.Sprint(most) {
				t.Errorf("since point %d: %s bytes pulled, want %d", from, pulled, most)
			}
		}
		stop()
	})
}

func TestNbdfuse(t *testing.T) {
	need(t, "nbdfuse", "fusermount3")
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("SKIPPED, no FUSE: %v", err)
	}
	d := newMemDisk(32 << 20)
	all := sparse(t, d)
	for network, uri := range endpoints(t, &Server{Exports: static(t, Export{Name: "a", Disk: d})}) {
		t.Run(network, func(t *testing.T) {
			dir := t.TempDir()
			cmd := exec.CommandContext(t.Context(), "nbdfuse", dir, uri("a"))
			var errs bytes.Buffer
			cmd.Stderr = &errs
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- cmd.Wait() }()
			defer func() {
				_ = exec.Command("fusermount3", "-u", dir).Run()
				select {
				case err := <-done:
					if err != nil {
						t.Errorf("nbdfuse: %v: %s", err, errs.String())
					}
				case <-time.After(20 * time.Second):
					t.Error("nbdfuse does not end")
					_ = cmd.Process.Kill()
				}
			}()
			file := filepath.Join(dir, "nbd")
			eventually(t, "it is mounted", func() bool { _, err := os.Stat(file); return err == nil })
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, all) {
				t.Errorf("read: wrong data, %v", err)
			}
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte("written through FUSE"), 5<<20); err != nil {
				t.Error(err)
			}
			if err := f.Sync(); err != nil {
				t.Error(err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			got := make([]byte, 20)
			if _, err := d.ReadAt(got, 5<<20); err != nil || string(got) != "written through FUSE" {
				t.Errorf("written: %q, %v", got, err)
			}
			if _, err := d.WriteAt(all[5<<20:5<<20+20], 5<<20); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestNbdsh(t *testing.T) {
	needLibnbd(t) // nbdsh takes the first Python that it finds, which may be another
	need(t, "/usr/bin/nbdsh")
	for network, uri := range endpoints(t, &Server{Exports: static(t, Export{Name: "a", Disk: newMemDisk(1 << 20)})}) {
		t.Run(network, func(t *testing.T) {
			out := run1(t, "env", "PATH=/usr/bin:/bin", "nbdsh", "-u", uri("a"), "-c", "h.pwrite(b'x' * 512, 1024)", "-c", "h.flush()", "-c", "print(h.get_size(), h.pread(2, 1535))")
			if out != "1048576 "+"bytearray(b'x\\x00')\n" {
				t.Errorf("%q", out)
			}
		})
	}
}
