package cbt_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tidemark/tidemark/bpf"
)

const imageSize = 16 << 20

// fileTruth feeds a replica from an image file's deltas while it is written to in every way,
// and returns where the two differ in the end. It is read past the page cache or through it.
func fileTruth(t *testing.T, fstype string, delay time.Duration, buffered bool) string {
	needsFileHooks(t, fstype)
	file := imageFile(t, mountNew(t, fstype, delay, ""), imageSize)
	src := openFile(t, bpf.Options{Dir: pinDir(t)}, file)
	r := &replica{dir: t.TempDir(), dev: file, src: src, buffered: buffered}
	var sizes sync.Mutex
	stop := fileWriters(t, file, fstype, imageSize, &sizes)
	time.Sleep(2 * time.Second)
	epochs := 10
	if v := os.Getenv("TIDEMARK_TRUTH_EPOCHS"); v != "" {
		var err error
		if epochs, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	var changed int64
	collisions := 0
	for i := range epochs {
		sizes.Lock()
		d, err := r.step(t.Context())
		// Where direct I/O meets pages that are being dirtied, the kernel fails one of them
		// (fs/iomap/direct-io.c). What changed is asked for again.
		for n := 0; n < 10 && errors.Is(err, syscall.EIO); n++ {
			collisions++
			d, err = r.step(t.Context())
		}
		sizes.Unlock()
		if err != nil {
			t.Fatalf("epoch %d: %v", i, err)
		}
		if i > 0 && len(d.Unknown) > 0 {
			t.Errorf("epoch %d is unknown: %v", i, d.Unknown)
		}
		changed += d.Extents.Bytes()
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
	}
	t.Logf("%d epochs in %v: the deltas held %d MiB, %d collisions; done meanwhile: %s", epochs, time.Since(begin).Round(time.Millisecond), changed>>20, collisions, stop())
	d, err := r.step(t.Context())
	if errors.Is(err, syscall.EIO) {
		d, err = r.step(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("least misses of %v: %v", d.Evidence.Programs, d.Evidence.LeastMisses)
	if bad := differing(t, r.dir, file, 4096); len(bad) > 0 {
		return fmt.Sprintf("%d blocks differ, the first at %#x", len(bad), bad[0])
	}
	return ""
}

// Every block of an image file that was written is in some delta.
func TestFileTruth(t *testing.T) {
	for _, fstype := range fileSystems {
		t.Run(fstype, func(t *testing.T) {
			if diff := fileTruth(t, fstype, 0, true); diff != "" {
				t.Error("MISSED: ", diff)
			}
		})
		// Direct writes stay in flight across swaps.
		t.Run(fstype+" on dm-delay", func(t *testing.T) {
			if diff := fileTruth(t, fstype, 25*time.Millisecond, false); diff != "" {
				t.Error("MISSED: ", diff)
			}
		})
	}
}
