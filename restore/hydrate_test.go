package restore_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

func TestLiveIsAWritableDisk(t *testing.T) {
	disktest.RunWritable(t, disktest.Writable{
		New: func(t *testing.T, content []byte) restore.WritableDisk {
			o, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "overlay"), disktest.Bytes(content), identity)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = o.Close() })
			return restore.NewHydratable(o)
		},
	})
}

// What a server can write to without asking is not seen to change, and would be missing from what
// was hydrated.
func TestNoWriteGoesPastAHydratableDisk(t *testing.T) {
	o, err := restore.CreateOverlay(filepath.Join(t.TempDir(), "overlay"), disktest.Bytes(make([]byte, 1<<20)), identity)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	var l restore.WritableDisk = restore.NewHydratable(o)
	if _, err := l.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if _, _, ok := o.WriteFile(0, 1<<20); !ok {
		t.Fatal("the overlay itself gives nothing to write to: this shows nothing")
	}
	if w, ok := l.(restore.WriteFiler); ok {
		if _, _, ok := w.WriteFile(0, 1<<20); ok {
			t.Error("it gives its file to be written to")
		}
	}
	if f, ok := l.(restore.Filer); ok {
		if _, ok := f.File(0, 1<<20); ok {
			t.Error("it gives its file to be read from: what is used is not seen")
		}
	}
}

// readAll returns a disk's content.
func readAll(t *testing.T, d restore.Disk) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// scribble writes and zeroes until stop is closed.
func scribble(l *restore.Hydratable, seed uint64, stop <-chan struct{}) error {
	rnd := rand.New(rand.NewPCG(seed, 5))
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		n := 1 + rnd.Int64N(1<<rnd.IntN(17))
		off := rnd.Int64N(l.Size() - n)
		if err := func() error {
			switch rnd.IntN(8) {
			case 0:
				return l.Zero(off, n)
			case 1:
				return l.Sync()
			}
			_, err := l.WriteAt(disktest.Noise(int(n), rnd.Uint64()), off)
			return err
		}(); err != nil {
			return err
		}
	}
}

func TestHydrateWhileItIsWritten(t *testing.T) {
	o, _ := newOverlay(t, disktest.Bytes(disktest.Content(24<<20+512, 3)))
	l := restore.NewHydratable(o)
	target := filepath.Join(t.TempDir(), "native.raw")
	stop := make(chan struct{})
	var wrote errorsOf
	for seed := range uint64(2) {
		wrote.Go(func() error { return scribble(l, seed, stop) })
	}
	h, err := l.Hydrate(t.Context(), target, restore.HydrateOptions{Enough: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Close() }()
	time.Sleep(50 * time.Millisecond) // more changes for the last round
	close(stop)
	if err := wrote.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the target has its name before it is whole: %v", err)
	}
	r, err := h.Finish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r.Last == 0 || r.Resumed {
		t.Errorf("result %+v", r)
	}
	same := func() {
		t.Helper()
		got, err := os.ReadFile(target)
		if err != nil || !bytes.Equal(got, readAll(t, l)) {
			t.Fatalf("the target differs, %v", err)
		}
	}
	same()
	// The move failed: writing goes on, and a second end brings that too.
	if _, err := l.WriteAt([]byte("more"), 5<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	same()
	if _, err := l.Hydrate(t.Context(), target, restore.HydrateOptions{}); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file that exists: %v", err)
	}
}

// errorsOf is goroutines and what went wrong in them.
type errorsOf struct {
	sync.WaitGroup
	mu  sync.Mutex
	err error
}

func (e *errorsOf) Go(f func() error) {
	e.WaitGroup.Go(func() {
		err := f()
		e.mu.Lock()
		defer e.mu.Unlock()
		e.err = errors.Join(e.err, err)
	})
}

func (e *errorsOf) Wait() error {
	e.WaitGroup.Wait()
	return e.err
}

// orderDisk notes where it is read.
type orderDisk struct {
	disktest.Bytes
	mu   sync.Mutex
	offs []int64
}

func (d *orderDisk) ReadAt(p []byte, off int64) (int, error) {
	return d.ReadAtContext(context.Background(), p, off)
}

func (d *orderDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	d.mu.Lock()
	d.offs = append(d.offs, off>>20)
	d.mu.Unlock()
	return d.Bytes.ReadAtContext(ctx, p, off)
}

func TestHotPiecesAreHydratedFirst(t *testing.T) {
	base := &orderDisk{Bytes: disktest.Noise(10<<20, 3)}
	o, _ := newOverlay(t, base)
	l := restore.NewHydratable(o)
	for _, mib := range []int64{7, 3} {
		if _, err := l.ReadAt(make([]byte, 512), mib<<20|4096); err != nil {
			t.Fatal(err)
		}
	}
	base.offs = nil
	h, err := l.Hydrate(t.Context(), filepath.Join(t.TempDir(), "native"), restore.HydrateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Close() }()
	if got := slices.Compact(base.offs); !slices.Equal(got, []int64{7, 3, 0, 1, 2, 4, 5, 6, 8, 9}) {
		t.Errorf("pieces were read in this order: %v", got)
	}
}

func TestHydrationKeepsToItsLimit(t *testing.T) {
	o, _ := newOverlay(t, disktest.Bytes(disktest.Noise(4<<20, 3)))
	begin := time.Now()
	h, err := restore.NewHydratable(o).Hydrate(t.Context(), filepath.Join(t.TempDir(), "native"), restore.HydrateOptions{Limit: 6 << 20})
	if err != nil {
		t.Fatal(err)
	}
	_ = h.Close()
	if took := time.Since(begin); took < 400*time.Millisecond { // 3 of 4 MiB wait
		t.Errorf("4 MiB at 6 MiB/s took %v", took)
	}
}

// countDisk counts what is read of it in bulk, as a repository would.
type countDisk struct {
	disktest.Bytes
	read atomic.Int64
}

func (d *countDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	d.read.Add(int64(len(p)))
	return d.Bytes.ReadAtContext(ctx, p, off)
}

// hydrateChild names the overlay that this process shall hydrate, if it is the child of
// the test below.
const hydrateChild = "TIDEMARK_TEST_HYDRATE"

func hydrateBase() disktest.Bytes { return disktest.Bytes(disktest.Noise(32<<20, 21)) }

// hydrateUntilKilled writes and hydrates slowly, and tells of each sync.
func hydrateUntilKilled(path string) error {
	o, err := restore.OpenOrCreateOverlay(path, hydrateBase(), identity)
	if err != nil {
		return err
	}
	l := restore.NewHydratable(o)
	go func() {
		h, err := l.Hydrate(context.Background(), path+".native", restore.HydrateOptions{Limit: 40 << 20})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		_, err = h.Finish(context.Background()) // beside writes: so it is not whole
		fmt.Println("finished", err)
		_ = os.Rename(path+".native", restore.Partial(path+".native"))
	}()
	fmt.Println("begun")
	return scribble(l, rand.Uint64(), nil)
}

func TestHydrationGoesOnAfterKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "overlay")
	for range 6 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), hydrateChild+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "begun") {
			t.Fatalf("child says %q, %v", line, err)
		}
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	base := &countDisk{Bytes: hydrateBase()}
	o, err := restore.OpenOverlay(path, base, identity)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	l := restore.NewHydratable(o)
	stop := make(chan struct{})
	var wrote errorsOf
	wrote.Go(func() error { return scribble(l, 99, stop) })
	h, err := l.Hydrate(t.Context(), path+".native", restore.HydrateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Close() }()
	close(stop)
	if err := wrote.Wait(); err != nil {
		t.Fatal(err)
	}
	r, err := h.Finish(t.Context())
	if err != nil || !r.Resumed {
		t.Fatalf("%+v, %v", r, err)
	}
	got, err := os.ReadFile(path + ".native")
	if err != nil || !bytes.Equal(got, readAll(t, l)) {
		t.Fatalf("the target differs from the disk, %v", err)
	}
}

func TestMovedOverlayIsNotUsed(t *testing.T) {
	base := disktest.Bytes(disktest.Content(1<<20, 3))
	o, path := newOverlay(t, base)
	if err := restore.MarkMoved(path, "/dev/vg0/web1"); err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := restore.OpenOrCreateOverlay(path, base, identity); !errors.Is(err, restore.ErrOverlayMoved) || !strings.Contains(err.Error(), "/dev/vg0/web1") {
		t.Errorf("opened: %v", err)
	}
	// Nor may an empty one take its place: it would be hydrated over the newer disk.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := restore.OpenOrCreateOverlay(path, base, identity); !errors.Is(err, restore.ErrOverlayMoved) {
		t.Errorf("made anew: %v", err)
	}
	for range 2 {
		if err := restore.UnmarkMoved(path); err != nil {
			t.Fatal(err)
		}
	}
	again, err := restore.OpenOrCreateOverlay(path, base, identity)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
}

// Whatever the guest writes meanwhile, a device does not look like a disk before it is one.
func TestHeadOfADeviceIsHydratedLast(t *testing.T) {
	o, _ := newOverlay(t, disktest.Bytes(disktest.Noise(4<<20, 3)))
	l := restore.NewHydratable(o)
	dev := loopDevice(t, bytes.Repeat([]byte{0xdd}, 4<<20))
	h, err := l.Hydrate(t.Context(), dev, restore.HydrateOptions{Enough: 1 << 20, Progress: func(done, total int64) {
		if done == total {
			if _, err := l.WriteAt(disktest.Noise(2<<20, 4), 512); err != nil {
				t.Error(err)
			}
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Close() }()
	got, err := os.ReadFile(dev)
	if err != nil || !bytes.Equal(got[:1<<20], make([]byte, 1<<20)) {
		t.Errorf("it has a head before the end, %v", err)
	}
	if _, err := h.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err = os.ReadFile(dev); err != nil || !bytes.Equal(got, readAll(t, l)) {
		t.Errorf("the device differs from the disk, %v", err)
	}
}
