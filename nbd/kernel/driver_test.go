package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The tests in this file are of the kernel's client: `make vmtest-nbd` runs them in a virtual machine.

func needDriver(t *testing.T) {
	t.Helper()
	if err := Available(); err != nil {
		t.Skipf("SKIPPED: %v (make vmtest-nbd)", err)
	}
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: not root")
	}
}

// attach attaches and keeps a device until the test ends. kept gets the result of Keep.
func attach(t *testing.T, o Options) (d *Device, kept <-chan error, notes *notes) {
	t.Helper()
	needDriver(t)
	n := newNotes(t)
	o.Note = n.add
	if o.Export == "" {
		o.Export = "disk"
	}
	d, err := Attach(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	result, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		err := d.Keep(ctx)
		if err == nil { // as a command does, so that others can have it
			_ = d.guard.Close()
		}
		if err != nil && ctx.Err() == nil {
			t.Errorf("Keep: %v", err)
		}
		result <- err
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		if err := Detach(d.index, true); err != nil && !errors.Is(err, ErrNotAttached) {
			t.Error(err)
		}
		_ = d.Close()
	})
	return d, result, n
}

type notes struct {
	t    *testing.T
	mu   sync.Mutex
	list []string
}

func newNotes(t *testing.T) *notes { return &notes{t: t} }

func (n *notes) add(text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.list = append(n.list, text)
}

func (n *notes) has(text string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Contains(strings.Join(n.list, "\n"), text)
}

func aligned(n int) []byte {
	b := make([]byte, n+4096)
	return b[4096-uintptr(unsafe.Pointer(&b[0]))%4096:][:n:n]
}

func openDirect(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func readSysfs(t *testing.T, index int, name string) string {
	t.Helper()
	b, err := os.ReadFile(sysfs(index, name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestDriverReadsAndWrites(t *testing.T) {
	needDriver(t)
	src := newDisk(t, 8<<20)
	s := serve(t, src)
	d, kept, _ := attach(t, Options{Index: -1, Dial: s.dial, Backend: "a test"})
	if d.Connections() != DefaultConnections || d.ReadOnly() || d.Size() != 8<<20 || d.BlockSize() != 512 {
		t.Errorf("%d connections, read-only %v, %d bytes in blocks of %d", d.Connections(), d.ReadOnly(), d.Size(), d.BlockSize())
	}
	if got := readSysfs(t, d.index, "size"); got != fmt.Sprint(8<<20/512) {
		t.Errorf("size %s", got)
	}
	if got := backendOf(d.index); got != "a test x4" && kernelAtLeast(t, 5, 14) {
		t.Errorf("backend %q", got)
	}
	f := openDirect(t, d.Path(), os.O_RDWR)
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 30 {
		n := (rnd.IntN(16) + 1) * 4096
		off := int64(rnd.IntN(8<<20-n) &^ 511)
		p := aligned(n)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		q := aligned(n)
		if _, err := f.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
			t.Fatalf("read back: %v", err)
		}
	}
	_ = f.Close()
	same(t, d.Path(), src)
	// What is only in the page cache is on the server after the device was detached.
	g, err := os.OpenFile(d.Path(), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.WriteAt([]byte("cached"), 12345); err != nil {
		t.Fatal(err)
	}
	_ = g.Close()
	before := src.syncs.Load()
	if err := Detach(d.index, false); err != nil {
		t.Fatal(err)
	}
	if err := <-kept; err != nil {
		t.Errorf("Keep: %v", err)
	}
	var got [6]byte
	if _, err := src.File.ReadAt(got[:], 12345); err != nil || string(got[:]) != "cached" {
		t.Errorf("%q, %v", got, err)
	}
	if src.syncs.Load() == before {
		t.Error("the server was not told to flush")
	}
	if err := Detach(d.index, false); !errors.Is(err, ErrNotAttached) {
		t.Errorf("detached twice: %v", err)
	}
}

func kernelAtLeast(t *testing.T, major, minor int) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var a, b int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	return a > major || a == major && b >= minor
}

func TestDriverReadOnly(t *testing.T) {
	needDriver(t)
	s := serve(t, newDisk(t, 1<<20))
	d, _, _ := attach(t, Options{Index: -1, Dial: s.dial, ReadOnly: true, Connections: 1})
	if !d.ReadOnly() || d.Connections() != 1 || readSysfs(t, d.index, "ro") != "1" {
		t.Errorf("ro is %s", readSysfs(t, d.index, "ro"))
	}
	f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt(make([]byte, 512), 0)
		_ = f.Close()
	}
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
		t.Errorf("write to it: %v", err)
	}
}

func TestDriverRefusesWhatIsTaken(t *testing.T) {
	needDriver(t)
	s := serve(t, newDisk(t, 1<<20))
	d, _, _ := attach(t, Options{Index: 5, Dial: s.dial, Backend: "one"})
	if d.Path() != "/dev/nbd5" {
		t.Error(d.Path())
	}
	for _, backend := range []string{"", "two", "one"} { // the last one is the device's own, and its connections work
		if _, err := Attach(t.Context(), Options{Index: 5, Dial: s.dial, Export: "disk", Backend: backend}); !errors.Is(err, ErrBusy) {
			t.Errorf("backend %q: %v", backend, err)
		}
	}
	if _, err := Attach(t.Context(), Options{Index: -1, Dial: s.dial, Export: "other"}); err == nil {
		t.Error("an export that is not there was attached")
	}
	f := openDirect(t, d.Path(), os.O_RDONLY)
	if _, err := f.ReadAt(aligned(4096), 0); err != nil {
		t.Error(err)
	}
}

// writer writes numbered blocks, over and over, and reads them again, until it is told to stop.
func writer(t *testing.T, path string, size int64) (stop func() (rounds int, longest time.Duration)) {
	f := openDirect(t, path, os.O_RDWR)
	quit, done := make(chan struct{}), make(chan struct{})
	rounds, longest := 0, time.Duration(0)
	go func() {
		defer close(done)
		p, q := aligned(4096), aligned(4096)
		for ; ; rounds++ {
			select {
			case <-quit:
				return
			default:
			}
			off := int64(rounds) * 4096 % size
			copy(p, fmt.Sprintf("round %d", rounds))
			begin := time.Now()
			if _, err := f.WriteAt(p, off); err != nil {
				t.Errorf("write of round %d: %v", rounds, err)
				return
			}
			if _, err := f.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
				t.Errorf("read of round %d: %v", rounds, err)
				return
			}
			longest = max(longest, time.Since(begin))
		}
	}()
	var once sync.Once
	stop = func() (int, time.Duration) {
		once.Do(func() { close(quit) })
		<-done
		_ = f.Close() // a device that is open stays a while after it was detached
		return rounds, longest
	}
	return stop
}

// TestServerComesBack kills the server in the middle of requests, three times, and starts it again: nobody
// who reads or writes sees more of it than that it took a while.
func TestServerComesBack(t *testing.T) {
	needDriver(t)
	for _, connections := range []int{1, 4} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) {
			src := newDisk(t, 2<<20)
			s := serve(t, src)
			d, _, notes := attach(t, Options{Index: -1, Dial: s.dial, Connections: connections, Timeout: 2 * time.Second, DeadConn: 60 * time.Second})
			var stops []func() (int, time.Duration)
			for range 2 {
				stops = append(stops, writer(t, d.Path(), 2<<20))
				stops = append(stops, func() (int, time.Duration) { return 0, 0 })
			}
			for range 3 {
				time.Sleep(500 * time.Millisecond)
				s.kill()
				time.Sleep(time.Second)
				s.start(src)
				eventually(t, "connected again", func() bool { return d.firstDeadNow() < 0 })
			}
			time.Sleep(500 * time.Millisecond)
			for _, stop := range stops {
				if n, longest := stop(); n > 0 {
					t.Logf("%d rounds, the longest took %v", n, longest)
					if longest < time.Second {
						t.Error("the server was not missed")
					}
				}
			}
			if !notes.has("can't be reached") || !notes.has("connected again") {
				t.Errorf("%q", notes.list)
			}
			same(t, d.Path(), src)
		})
	}
}

// firstDeadNow is firstDead while Keep may change the links.
func (d *Device) firstDeadNow() int {
	for i := range d.links {
		if d.links[i].dead() {
			return i
		}
	}
	return -1
}

func TestServerStaysAway(t *testing.T) {
	needDriver(t)
	src := newDisk(t, 1<<20)
	s := serve(t, src)
	d, kept, _ := attach(t, Options{Index: -1, Dial: s.dial, Timeout: 2 * time.Second, DeadConn: 3 * time.Second})
	f := openDirect(t, d.Path(), os.O_RDONLY)
	s.kill()
	begin := time.Now()
	_, err := f.ReadAt(aligned(4096), 0)
	took := time.Since(begin)
	if !errors.Is(err, unix.EIO) || took < 2*time.Second || took > 30*time.Second {
		t.Errorf("%v after %v", err, took)
	}
	t.Logf("a read failed after %v: %v", took, err)
	// It can be used again when the server is there again, and detached either way.
	s.start(src)
	eventually(t, "the connections are replaced", func() bool { return d.firstDeadNow() < 0 })
	eventually(t, "a read succeeds again", func() bool { _, err := f.ReadAt(aligned(4096), 0); return err == nil })
	s.kill()
	_ = f.Close()
	if err := Detach(d.index, true); err != nil {
		t.Error(err)
	}
	if err := <-kept; err != nil {
		t.Error(err)
	}
}

// TestRequestThatHangs has one request never be answered: its connection is given up and it is asked again.
func TestRequestThatHangs(t *testing.T) {
	needDriver(t)
	for _, connections := range []int{1, 2} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) {
			src := newDisk(t, 1<<20)
			s := serve(t, src)
			d, _, _ := attach(t, Options{Index: -1, Dial: s.dial, Connections: connections, Timeout: 2 * time.Second, DeadConn: 60 * time.Second})
			f := openDirect(t, d.Path(), os.O_RDONLY)
			hang := make(chan struct{})
			defer close(hang)
			src.hang.Store(&hang)
			before := src.reads.Load()
			go func() {
				for src.reads.Load() == before {
					time.Sleep(time.Millisecond)
				}
				src.hang.Store(nil) // for those that follow
			}()
			begin := time.Now()
			if _, err := f.ReadAt(aligned(4096), 0); err != nil {
				t.Fatal(err)
			}
			t.Logf("answered after %v", time.Since(begin))
			eventually(t, "the connection is replaced", func() bool { return d.firstDeadNow() < 0 })
		})
	}
}

// TestDetachedWhileAsking detaches while requests are under way: they fail, and nothing hangs.
func TestDetachedWhileAsking(t *testing.T) {
	needDriver(t)
	src := newDisk(t, 1<<20)
	s := serve(t, src)
	d, kept, _ := attach(t, Options{Index: -1, Dial: s.dial, Timeout: 30 * time.Second})
	hang := make(chan struct{})
	letGo := sync.OnceFunc(func() { close(hang) })
	t.Cleanup(letGo) // else the server would not end
	var files []*os.File
	for range 4 { // before reads hang: the first one to open it has the kernel look for partitions
		files = append(files, openDirect(t, d.Path(), os.O_RDONLY))
	}
	src.hang.Store(&hang)
	failed, before := make(chan error, 4), src.reads.Load()
	for i, f := range files {
		go func() {
			_, err := f.ReadAt(aligned(4096), int64(i)*65536)
			_ = f.Close()
			failed <- err
		}()
	}
	// Those that came over the same connection wait for the first.
	eventually(t, "requests have come", func() bool { return src.reads.Load() > before })
	time.Sleep(300 * time.Millisecond)
	begin := time.Now()
	if err := Detach(d.index, true); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		select {
		case err := <-failed:
			if !errors.Is(err, unix.EIO) {
				t.Errorf("read: %v", err)
			}
		case <-time.After(60 * time.Second):
			t.Fatal("a read hangs")
		}
	}
	letGo()
	if err := <-kept; err != nil {
		t.Error(err)
	}
	t.Logf("all failed %v after the device was detached", time.Since(begin))
	// The server serves on, and the device can be had again.
	src.hang.Store(nil)
	e, _, _ := attach(t, Options{Index: -1, Dial: s.dial})
	same(t, e.Path(), src)
}

// TestTakenOver plays a process that is killed: its device stays, and another process goes on with it.
func TestTakenOver(t *testing.T) {
	needDriver(t)
	if !kernelAtLeast(t, 5, 14) {
		t.Skip("SKIPPED: this kernel does not keep what is attached")
	}
	src := newDisk(t, 1<<20)
	s := serve(t, src)
	o := Options{Index: 7, Dial: s.dial, Export: "disk", Backend: "mine", Timeout: 2 * time.Second, DeadConn: 60 * time.Second}
	d, err := Attach(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	stop := writer(t, d.Path(), 1<<20)
	time.Sleep(300 * time.Millisecond)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	s.kill()
	time.Sleep(time.Second)
	s.start(src)
	e, _, _ := attach(t, o)
	if !e.Resumed() || e.index != 7 {
		t.Errorf("resumed %v, %s", e.Resumed(), e.Path())
	}
	time.Sleep(500 * time.Millisecond)
	n, longest := stop()
	t.Logf("%d rounds, the longest took %v", n, longest)
	same(t, e.Path(), src)
}

// TestServerComesBackWithAnotherDisk: a larger one is taken, and the device grows; others are not.
func TestServerComesBackWithAnotherDisk(t *testing.T) {
	needDriver(t)
	src := newDisk(t, 1<<20)
	s := serve(t, src)
	d, _, notes := attach(t, Options{Index: -1, Dial: s.dial, Timeout: 2 * time.Second, DeadConn: 60 * time.Second})
	s.kill()
	s.start(newDisk(t, 1<<19))
	eventually(t, "refused", func() bool { return notes.has("can't be a block device") })
	if got := readSysfs(t, d.index, "size"); got != "2048" {
		t.Errorf("size %s", got)
	}
	s.kill()
	if err := src.Truncate(2 << 20); err != nil {
		t.Fatal(err)
	}
	src.size = 2 << 20
	s.start(src)
	eventually(t, "grown", func() bool { return notes.has("grown to 2097152") })
	if got := readSysfs(t, d.index, "size"); got != "4096" {
		t.Errorf("size %s", got)
	}
	f := openDirect(t, d.Path(), os.O_RDWR)
	if _, err := f.WriteAt(aligned(4096), 2<<20-4096); err != nil {
		t.Error(err)
	}
	same(t, d.Path(), src)
}

// TestNbdClient holds the kernel's other user-space part against our server: it negotiates by itself, and
// attaches by netlink or by the old ioctls.
func TestNbdClient(t *testing.T) {
	needDriver(t)
	if _, err := exec.LookPath("nbd-client"); err != nil {
		t.Skipf("SKIPPED, an independent client is missing: %v", err)
	}
	for name, flags := range map[string][]string{"netlink": {"-C", "4"}, "ioctl": {"-nonetlink"}, "ioctl, 4 connections": {"-nonetlink", "-C", "4"}} {
		t.Run(name, func(t *testing.T) {
			src := newDisk(t, 2<<20)
			s := serve(t, src)
			args := append([]string{"-unix", s.socket, "/dev/nbd9", "-N", "disk"}, flags...)
			if out, err := exec.Command("nbd-client", args...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			eventually(t, "attached", func() bool { return readSysfs(t, 9, "size") == "4096" })
			stop := writer(t, "/dev/nbd9", 2<<20)
			time.Sleep(time.Second)
			if n, _ := stop(); n == 0 {
				t.Error("nothing was written")
			} else {
				t.Logf("%d rounds", n)
			}
			same(t, "/dev/nbd9", src)
			if out, err := exec.Command("nbd-client", "-d", "/dev/nbd9").CombinedOutput(); err != nil {
				t.Errorf("disconnect: %v: %s", err, out)
			}
			eventually(t, "detached", func() bool { _, err := os.Stat(sysfs(9, "pid")); return err != nil })
		})
	}
}
