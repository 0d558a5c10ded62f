package cbt_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// What was read and is not marked afterwards is what the last delta made of it,
// whatever is in flight: else an audit would cry wolf.
func TestUnmarkedIsUnchanged(t *testing.T) {
	emulated := os.Getenv("TIDEMARK_TESTVM") != ""
	t.Run("loop", func(t *testing.T) {
		if emulated {
			t.Skip("SKIP: it takes minutes when emulated, `make test` runs it on the host")
		}
		testUnmarked(t, loopDisk(t))
	})
	t.Run("dm-delay", func(t *testing.T) {
		testUnmarked(t, whole(delayDevice(t, truthSize, 25*time.Millisecond), "512"))
	})
	t.Run("zram", func(t *testing.T) {
		testUnmarked(t, whole(trackedZram(t, truthSize), "4k"))
	})
}

func testUnmarked(t *testing.T, target target) {
	dev, dir := target.dev, t.TempDir()
	r, closeReplica, err := openReplica(dir, pinDir(t), dev)
	if err != nil {
		t.Fatal(err)
	}
	defer closeReplica()
	a := r.src.(cbt.Auditor)
	stop := writers(t, target)
	defer stop()
	waitForWrites(t, r.src)
	epochs := 60
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		epochs = 6
	}
	disk, err := os.OpenFile(dev, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = disk.Close() }()
	const n = 64 << 10
	now, then := aligned(n), make([]byte, n)
	// differs reads a granule: different, and not marked after it was read.
	differs := func(off int64) (marked, differs bool) {
		if _, err := disk.ReadAt(now, off); err != nil {
			t.Fatal(err)
		}
		if a.Marked(off, n) {
			return true, false
		}
		f, err := os.Open(filepath.Join(dir, "replica"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		if _, err := f.ReadAt(then, off); err != nil {
			t.Fatal(err)
		}
		return false, !bytes.Equal(now, then)
	}
	var good, void, late int
	for i := range epochs {
		if _, err := r.step(t.Context()); err != nil {
			t.Fatalf("epoch %d: %v", i, err)
		}
		var suspects []int64
		for range 100 {
			off := rand.Int64N(truthSize/n) * n
			switch marked, diff := differs(off); {
			case marked:
				void++
			case diff:
				suspects = append(suspects, off)
			default:
				good++
			}
		}
		if len(suspects) == 0 {
			continue
		}
		time.Sleep(200 * time.Millisecond)
		for _, off := range suspects {
			if _, diff := differs(off); diff {
				t.Errorf("epoch %d: granule at %#x differs and is not marked", i, off)
			}
			late++
		}
	}
	t.Logf("%d granules unmarked and equal, %d marked meanwhile, %d that differed when read first", good, void, late)
	if good == 0 || void == 0 {
		t.Error("readers and writers did not meet")
	}
}

func TestMarksAndDistrust(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	if err := s.Commit(id); err != nil {
		t.Fatal(err)
	}
	write(t, dev, 1<<20)
	changes(t, s, id) // of a backup that failed: its epoch is retained
	write(t, dev, 3<<20)
	bm, ev, err := s.Marks(id)
	if x := bm.Extents(); err != nil || len(x) != 2 || x[0].Off != 1<<20 || x[1].Off != 3<<20 || ev.Dirty != 2 || ev.FirstEpoch != 2 || ev.LastEpoch != 3 {
		t.Errorf("%v: %v, %+v", err, x, ev)
	}
	// Marked knows the current epoch alone.
	for off, want := range map[int64]bool{0: false, 1 << 20: false, 3<<20 - 1: false, 3 << 20: true, 3<<20 + 65535: true, 3<<20 + 65536: false} {
		if got := s.Marked(off, 1); got != want {
			t.Errorf("%#x is marked: %v", off, got)
		}
	}
	if !s.Marked(0, small) || s.Marked(0, 3<<20) {
		t.Error("a range is marked if a part of it is")
	}
	s.Distrust()
	if _, _, err := s.Marks(id); !errors.Is(err, cbt.ErrUnproven) || !strings.Contains(err.Error(), "an audit found a change that was not recorded") {
		t.Errorf("distrusted: %v", err)
	}
	// Another process believes it no more than this one.
	_ = s.Close()
	s = open(t, bpf.Options{Dir: pins}, dev)
	d := changes(t, s, id)
	wantUnknown(t, d, small, "an audit found a change that was not recorded")
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
		t.Errorf("the next epoch: %v", d.Unknown)
	}
}

func TestAdoptBeginsNothing(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	tr, err := bpf.Open(bpf.Options{Dir: pins})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tr.Close() }()
	if _, err := cbt.Adopt(tr, dev); !errors.Is(err, cbt.ErrUnproven) {
		t.Errorf("untracked: %v", err)
	}
	if all, err := tr.Status(); err != nil || len(all) != 0 {
		t.Errorf("%v: tracked now: %+v", err, all)
	}
	s := open(t, bpf.Options{Dir: pins}, dev)
	if _, err := cbt.Adopt(tr, dev); !errors.Is(err, bpf.ErrBusy) {
		t.Errorf("held: %v", err)
	}
	_ = s.Close()
	a, err := cbt.Adopt(tr, dev)
	if err != nil {
		t.Fatal(err)
	}
	_ = a.Close()
}
