package appliance_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/guestfs/appliance"
	"github.com/tidemark/tidemark/restore"
	testvm "github.com/tidemark/tidemark/test/vm"
)

// program is tidemark, linked statically: under -race the test itself is not.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "tidemark-appliance-")
	if err != nil {
		return "", err
	}
	temporary = dir
	path := filepath.Join(dir, "tidemark")
	c := exec.Command("go", "build", "-o", path, "github.com/tidemark/tidemark/cmd/tidemark")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := c.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

var temporary string

func TestMain(m *testing.M) {
	status := m.Run()
	if temporary != "" {
		_ = os.RemoveAll(temporary)
	}
	os.Exit(status)
}

// config is one with a kernel that has all file systems.
func config(t *testing.T) appliance.Config {
	t.Helper()
	for _, tool := range []string{"qemu-system-x86_64", "xz"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %v", err)
		}
	}
	k, err := testvm.FetchKernel(t.Context(), testvm.KernelSource{Package: "linux-image-6.12-cloud-amd64", Suite: "bookworm-security"})
	if err != nil {
		t.Skipf("SKIPPED: no kernel: %v", err)
	}
	p, err := program()
	if err != nil {
		t.Fatal(err)
	}
	accel, err := testvm.Accel(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	return appliance.Config{Kernel: k.Image + ":" + filepath.Join(k.Dir, "lib/modules", k.Release), Program: p, Accel: accel}
}

func newPool(t *testing.T, c appliance.Config) *appliance.Pool {
	t.Helper()
	p := appliance.NewPool(c)
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// fileDisk is an image as a disk that can't be written.
type fileDisk struct {
	*os.File
	size int64
}

func (d fileDisk) Size() int64 { return d.size }
func (d fileDisk) Extents(_ context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) {
		if n = min(n, d.size-off); n > 0 {
			yield(restore.Extent{Off: off, Len: n}, nil)
		}
	}
}

func image(path string) appliance.Opener {
	return func(context.Context) (restore.Disk, io.Closer, error) {
		f, err := os.Open(path)
		if err != nil {
			return nil, nil, err
		}
		st, err := f.Stat()
		return fileDisk{f, st.Size()}, f, err
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// TestExt4 reads a file system that mkfs filled from a directory.
func TestExt4(t *testing.T) {
	c := config(t)
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	big := bytes.Repeat([]byte("0123456789abcdef"), 100<<10)
	for name, content := range map[string][]byte{"hello": []byte("hello\n"), "sub/big": big, "sub/\xff\xfe": nil} {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, content, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	img := filepath.Join(dir, "img")
	run(t, "truncate", "-s", "64M", img)
	run(t, "mkfs.ext4", "-q", "-L", "root", "-d", src, img)
	began := time.Now()
	d := newPool(t, c).Disk(img, image(img))
	vs, err := d.Volumes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%v: %+v", time.Since(began), vs)
	if len(vs) != 1 || vs[0].Name != "whole" || vs[0].Kind != "ext4" || vs[0].State != guestfs.Clean || vs[0].Label != "root" {
		t.Fatalf("volumes are %+v", vs)
	}
	tree, err := d.Tree(t.Context(), "whole")
	if err != nil {
		t.Fatal(err)
	}
	f, err := tree.Open(t.Context(), "sub/big")
	if err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<40))
	if err != nil || !bytes.Equal(got, big) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	t.Logf("read in %v", time.Since(began))
	var names []string
	for e, err := range tree.ReadDir(t.Context(), "sub") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, e.Name)
	}
	if len(names) != 2 {
		t.Errorf("names are %q", names)
	}
}
