package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/nbd/kernel"
)

// guest runs programs where the kernel has an NBD client: `make vmtest-nbd`.
type guest struct {
	t    *testing.T
	dir  string
	repo string
	tool string // this test, as tidemark
}

// newGuest makes a repository with a point of a disk of 24 MiB with a file system, and returns the disk.
func newGuest(t *testing.T) (g *guest, disk string) {
	t.Helper()
	if err := kernel.Available(); err != nil || os.Getuid() != 0 {
		t.Skipf("SKIPPED: %v, or not root (make vmtest-nbd)", err)
	}
	g = &guest{t: t, dir: t.TempDir()}
	g.repo, g.tool = filepath.Join(g.dir, "repo"), filepath.Join(g.dir, "tidemark")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, g.tool); err != nil {
		t.Fatal(err)
	}
	disk = filepath.Join(g.dir, "disk")
	g.run("truncate", "-s", "24M", disk)
	g.run("mkfs.ext4", "-q", "-F", disk)
	dev := strings.TrimSpace(g.run("losetup", "--show", "-f", disk))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev).Run() })
	mnt := g.mount(dev, "")
	g.run("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of="+mnt+"/$i bs=100k count=3; done 2> /dev/null")
	g.run("umount", mnt)
	g.run("tidemark", "init", "-r", g.repo)
	g.run("tidemark", "backup", "vm", "--disk", dev, "-r", g.repo, "-q")
	return g, disk
}

func (g *guest) command(name string, args ...string) *exec.Cmd {
	c := exec.Command(name, args...)
	if name == "tidemark" {
		c.Path, c.Err = g.tool, nil
	}
	c.Dir = g.dir
	return c
}

func (g *guest) try(name string, args ...string) (string, error) {
	out, err := g.command(name, args...).CombinedOutput()
	return string(out), err
}

func (g *guest) run(name string, args ...string) string {
	g.t.Helper()
	out, err := g.try(name, args...)
	if err != nil {
		g.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return out
}

func (g *guest) mount(dev, options string) string {
	g.t.Helper()
	dir, err := os.MkdirTemp(g.dir, "mnt")
	if err != nil {
		g.t.Fatal(err)
	}
	args := []string{"-t", "ext4", dev, dir}
	if options != "" {
		args = append(args, "-o", options)
	}
	g.run("mount", args...)
	g.t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	return dir
}

// background is a command that stays.
type background struct {
	attached
	g    *guest
	c    *exec.Cmd
	errs bytes.Buffer
	done chan error
}

func (g *guest) start(args ...string) *background {
	g.t.Helper()
	b := &background{g: g, c: g.command("tidemark", args...), done: make(chan error, 1)}
	b.c.Stderr = &b.errs
	out, err := b.c.StdoutPipe()
	if err != nil {
		g.t.Fatal(err)
	}
	if err := b.c.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = b.c.Process.Kill() })
	if err := json.NewDecoder(out).Decode(&b.attached); err != nil {
		_ = b.c.Wait()
		g.t.Fatalf("%v: %v: %s", args, err, b.errs.String())
	}
	go func() { b.done <- b.c.Wait() }()
	return b
}

func (g *guest) attach(args ...string) *background {
	g.t.Helper()
	return g.start(append([]string{"attach", "--json"}, args...)...)
}

// serve exports the point on a socket.
func (g *guest) serve(args ...string) *background {
	g.t.Helper()
	socket := filepath.Join(g.dir, "s")
	b := &background{g: g, c: g.command("tidemark", append([]string{"export", "vm@latest", "-r", g.repo, "--socket", socket}, args...)...), done: make(chan error, 1)}
	b.c.Stderr = &b.errs
	_ = os.Remove(socket)
	if err := b.c.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = b.c.Process.Kill() })
	go func() { b.done <- b.c.Wait() }()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return b
		}
		if time.Now().After(deadline) {
			g.t.Fatalf("no export: %s", b.errs.String())
		}
	}
}

func (b *background) wait() error {
	b.g.t.Helper()
	select {
	case err := <-b.done:
		return err
	case <-time.After(60 * time.Second):
		b.g.t.Fatalf("%v does not end: %s", b.c.Args, b.errs.String())
		return nil
	}
}

func (b *background) signal(s os.Signal) {
	b.g.t.Helper()
	if err := b.c.Process.Signal(s); err != nil {
		b.g.t.Fatal(err)
	}
}

// TestAttachPoint: a point as a block device is the disk it was made of, and can't be written to.
func TestAttachPoint(t *testing.T) {
	g, disk := newGuest(t)
	b := g.attach("vm@latest", "-r", g.repo)
	if !b.ReadOnly || b.Size != 24<<20 || b.Connections != kernel.DefaultConnections || b.Resumed {
		t.Errorf("%+v", b.attached)
	}
	g.run("cmp", disk, b.Device)
	mnt := g.mount(b.Device, "ro,noload")
	if out := g.run("ls", mnt); !strings.Contains(out, "8") {
		t.Errorf("%s", out)
	}
	// While it is mounted nothing takes it away.
	if out, err := g.try("tidemark", "detach", b.Device); err == nil || !strings.Contains(out, "is mounted") {
		t.Errorf("detached while mounted: %v: %s", err, out)
	}
	b.signal(os.Interrupt)
	time.Sleep(2 * time.Second)
	select {
	case err := <-b.done:
		t.Errorf("ended while mounted: %v", err)
	default:
	}
	g.run("umount", mnt)
	if err := b.wait(); err != nil || !strings.Contains(b.errs.String(), "is mounted") {
		t.Errorf("%v: %s", err, b.errs.String())
	}
	if out, err := g.try("tidemark", "detach", b.Device); err == nil || !strings.Contains(out, "not attached") {
		t.Errorf("detached twice: %v: %s", err, out)
	}
}

// TestAttachOverlay: what is written to the device is in the overlay, also when the command is killed meanwhile
// and started again.
func TestAttachOverlay(t *testing.T) {
	g, disk := newGuest(t)
	args := []string{"vm@latest", "-r", g.repo, "--device", "/dev/nbd4", "--writable", "--overlay", "overlay", "--timeout", "3s"}
	b := g.attach(args...)
	if b.ReadOnly || b.Device != "/dev/nbd4" {
		t.Errorf("%+v", b.attached)
	}
	fio := g.command("fio", "--name=v", "--filename=/dev/nbd4", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=8",
		"--offset=8m", "--size=8m", "--io_size=8m", "--verify=crc32c", "--verify_fatal=1", "--rate_iops=200")
	var said bytes.Buffer
	fio.Stdout, fio.Stderr = &said, &said
	if err := fio.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	_ = b.c.Process.Kill()
	_ = b.wait()
	time.Sleep(time.Second)
	b = g.attach(args...)
	if !b.Resumed {
		t.Errorf("%+v", b.attached)
	}
	if err := fio.Wait(); err != nil {
		t.Errorf("fio: %v: %s", err, said.String())
	}
	if out, err := g.try("tidemark", "attach", "vm@latest", "-r", g.repo, "--device", "/dev/nbd4"); err == nil || !strings.Contains(out, "attached already") {
		t.Errorf("attached twice: %v: %s", err, out)
	}
	g.run("dd", "if=/dev/nbd4", "of=written", "bs=1M")
	g.run("tidemark", "detach", "/dev/nbd4")
	if err := b.wait(); err != nil {
		t.Errorf("%v: %s", err, b.errs.String())
	}
	b = g.attach(args...)
	g.run("cmp", "written", b.Device)
	if _, err := g.try("cmp", disk, b.Device); err == nil {
		t.Error("nothing was written")
	}
	g.run("mkfs.ext4", "-q", "-F", b.Device)
	mnt := g.mount(b.Device, "")
	g.run("dd", "if=/dev/urandom", "of="+mnt+"/file", "bs=100k", "count=20")
	g.run("umount", mnt)
	g.run("e2fsck", "-fn", b.Device)
	b.signal(unix.SIGTERM)
	if err := b.wait(); err != nil {
		t.Errorf("%v: %s", err, b.errs.String())
	}
	g.run("tidemark", "restore", "vm@latest", "-r", g.repo, "-o", "out", "-q")
	g.run("cmp", disk, "out")
}

// TestAttachServer: the server of a device is killed under load and started again.
func TestAttachServer(t *testing.T) {
	g, _ := newGuest(t)
	s := g.serve("--writable", "--overlay", "overlay")
	b := g.attach("nbd+unix:///disk0?socket="+filepath.Join(g.dir, "s"), "--writable", "--timeout", "3s")
	if b.ReadOnly || b.Connections != kernel.DefaultConnections {
		t.Errorf("%+v", b.attached)
	}
	mnt := g.mount(b.Device, "")
	fio := g.command("fio", "--name=v", "--directory="+mnt, "--rw=randwrite", "--bs=4k", "--ioengine=psync", "--fsync=16", "--size=6m", "--io_size=6m",
		"--verify=crc32c", "--verify_fatal=1", "--rate_iops=150")
	var said bytes.Buffer
	fio.Stdout, fio.Stderr = &said, &said
	if err := fio.Start(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		time.Sleep(2 * time.Second)
		_ = s.c.Process.Kill()
		_ = s.wait()
		time.Sleep(time.Second)
		s = g.serve("--writable", "--overlay", "overlay")
	}
	if err := fio.Wait(); err != nil {
		t.Errorf("fio: %v: %s", err, said.String())
	}
	g.run("umount", mnt)
	g.run("e2fsck", "-fn", b.Device)
	if !strings.Contains(b.errs.String(), "connected again") {
		t.Errorf("%s", b.errs.String())
	}
	b.signal(os.Interrupt)
	if err := b.wait(); err != nil {
		t.Errorf("%v: %s", err, b.errs.String())
	}
	if out, err := g.try("tidemark", "attach", "nbd+unix:///disk7?socket="+filepath.Join(g.dir, "s")); err == nil || !strings.Contains(out, "unknown export") {
		t.Errorf("%v: %s", err, out)
	}
}
