package cbt_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// A write in flight across a swap is lost if it isn't marked when it completes: the
// truth test must see that, and that the whole protocol loses nothing.
func TestBrokenNoCompletionMarks(t *testing.T) {
	dev := delayDevice(t, truthSize, 200*time.Millisecond)
	if n := sweep(t, bpf.Options{Broken: bpf.BrokenNoComplete}, dev, bpf.DefaultGranuleShift, ""); n.lost == 0 {
		t.Errorf("a tracker that doesn't mark completions lost nothing: this test proves nothing (%s)", n)
	} else {
		t.Logf("TRUTH-BROKEN no completion marks: %s", n)
	}
	if n := sweep(t, bpf.Options{}, dev, bpf.DefaultGranuleShift, ""); n.lost != 0 || n.unknown != 0 {
		t.Errorf("MISSED: %s", n)
	} else {
		t.Logf("TRUTH-BROKEN the whole protocol: %s", n)
	}
}

// NVMe completes in a hard interrupt, also in one that comes while a program of ours
// runs for another device on the same processor: the kernel then drops the event for
// that program. Without marks at submission, one copy must be seen to lose blocks, and
// three must lose none.
func TestBrokenOneCopy(t *testing.T) {
	dev := scratchDisk(t, "nvme*n*", "")
	// 4 KiB granules: many writes, each of which alone can be lost.
	const shift = bpf.MinGranuleShift
	busy, stop := busyLoop(t)
	defer stop()
	o := bpf.Options{Broken: bpf.BrokenNoSubmit, Copies: 1}
	// How often an interrupt hits the very moment, nobody knows.
	var n swept
	for try := 0; try < 6 && n.missed[0] == 0; try++ {
		n = sweep(t, o, dev, shift, busy)
	}
	if n.lost == 0 || n.missed[0] == 0 {
		t.Errorf("a tracker of one copy lost nothing: this test proves nothing (%s)", n)
	} else {
		t.Logf("TRUTH-BROKEN one copy: %s", n)
	}
	// With so much of it each copy misses some event, though none is missed by all. The
	// counters can't tell these apart, so in real life such an epoch is unknown.
	o.Copies = 3
	if n := sweep(t, o, dev, shift, busy); n.lost != 0 || n.unknown != 0 {
		t.Errorf("MISSED: %s", n)
	} else {
		t.Logf("TRUTH-BROKEN three copies: %s", n)
	}
}

// swept is what a sweep found.
type swept struct {
	blocks, epochs, lost, unknown int
	missed                        [3]uint64 // by the copies of the program that sees completed requests
}

func (n swept) String() string {
	return fmt.Sprintf("%d blocks written once, %d epochs, %d granules lost, %d epochs unknown, completions missed by copy %v", n.blocks, n.epochs, n.lost, n.unknown, n.missed)
}

// sweep writes granules, 2,048 at most, once each in random order, while a replica follows: what was
// lost is not healed by a later write. If busy is another device, it is tracked too, and
// the writers run on processor 0 as those of busyLoop do.
func sweep(t *testing.T, o bpf.Options, dev string, shift uint, busy string) (n swept) {
	t.Helper()
	dir := t.TempDir()
	o.Dir = fmt.Sprintf("%s-%d-%d", pinDir(t), o.Broken, o.Copies)
	// The kernel's counters are hidden from the tracker: it would rightly compare the
	// whole disk, and heal what the bits don't hold.
	var seen bpf.Misses
	o.Misses = func(kernel bpf.Misses) bpf.Misses { seen = kernel; return bpf.Misses{} }
	defer func() {
		if err := bpf.Remove(o.Dir); err != nil {
			t.Error(err)
		}
	}()
	r, closeReplica, err := openReplicaWith(o, shift, dir, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer closeReplica()
	if busy != "" {
		// Programs that have something to do take longer.
		src, err := cbt.OpenTracked(r.tracker, busy, shift)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = src.Close() }()
	}
	step := func() {
		d, err := r.step(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n.epochs > 0 && len(d.Unknown) > 0 {
			n.unknown++
			t.Log("unknown: ", d.Unknown)
		}
		n.epochs++
	}
	step() // the whole disk
	if _, err := r.tracker.Misses(); err != nil {
		t.Fatal(err)
	}
	before := seen
	blocks := mrand.Perm(int(truthSize >> shift))
	blocks = blocks[:min(len(blocks), 2048)]
	n.blocks = len(blocks)
	next := make(chan int, len(blocks))
	for _, b := range blocks {
		next <- b
	}
	close(next)
	var wg sync.WaitGroup
	for range 16 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := writeBlocks(dev, shift, next, busy != ""); err != nil {
				t.Error(err)
			}
		}()
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for running := true; running; {
		step()
		select {
		case <-done:
			running = false
		default:
		}
	}
	step()
	if _, err := r.tracker.Misses(); err != nil {
		t.Fatal(err)
	}
	for i, p := range bpf.ProgramNames() {
		for c := range n.missed {
			if p == "rq_complete" {
				n.missed[c] = seen[i*len(n.missed)+c] - before[i*len(n.missed)+c]
			}
		}
	}
	n.lost = len(differing(t, dir, dev, 1<<shift))
	return n
}

// writeBlocks writes 4 KiB of new data to the beginning of each granule it is given.
func writeBlocks(dev string, shift uint, next <-chan int, pinned bool) error {
	if pinned {
		// The thread ends with the goroutine, it is not used with that mask again.
		runtime.LockOSThread()
		var set unix.CPUSet
		set.Set(0)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(dev, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	buf := aligned(4096)
	for b := range next {
		_, _ = rand.Read(buf)
		if _, err := f.WriteAt(buf, int64(b)<<shift); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return f.Close()
}

// busyLoop keeps a loop device on processor 0 completing discards until stop is called.
// Each covers so many granules that the programs are at it for long.
func busyLoop(t *testing.T) (dev string, stop func()) {
	t.Helper()
	dev = loopDevice(t, 1<<30, "")
	// Complete where it was submitted, whatever caches the processors share.
	if err := os.WriteFile(filepath.Join("/sys/block", filepath.Base(dev), "queue/rq_affinity"), []byte("2"), 0); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), "fio", "--name=busy", "--filename="+dev, "--rw=randtrim", "--bs=256m", "--direct=1", "--ioengine=psync",
		"--cpus_allowed=0", "--time_based", "--runtime=7200", "--norandommap")
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 20 * time.Second
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	return dev, sync.OnceFunc(func() {
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait()
	})
}
