package agent_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/store"
)

// A journal: record n is written to its slot, and only then to the head, which names it.
const (
	slots    = 64
	slotSize = 128 << 10
	headAt   = 12 << 20
)

// recordEvery is longer than a pause takes, emulated or not: else each is seen to fail.
func recordEvery() time.Duration {
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		return time.Second
	}
	return 20 * time.Millisecond
}

// journal writes records until stop is closed.
func journal(t *testing.T, dev string, stop <-chan struct{}) (done chan struct{}) {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_WRONLY|os.O_SYNC|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	done = make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _ = f.Close() }()
		mem, err := syscall.Mmap(-1, 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
		if err != nil {
			t.Error(err)
			return
		}
		for n := uint64(1); ; n++ {
			binary.LittleEndian.PutUint64(mem, n)
			for _, off := range []int64{int64(n%slots) * slotSize, headAt} {
				if _, err := f.WriteAt(mem, off); err != nil {
					t.Error(err)
					return
				}
			}
			select {
			case <-stop:
				return
			case <-time.After(recordEvery()):
			}
		}
	}()
	return done
}

// A writer that is not the one that was paused makes the attempt fail; it never makes
// a torn point that says it is good.
func TestUnpausedWriterNeverTearsAPoint(t *testing.T) { neverTorn(t, newBench(t), journal) }

func neverTorn(t *testing.T, b *bench, journal func(t *testing.T, dev string, stop <-chan struct{}) (done chan struct{})) {
	b.write(t, 0, make([]byte, 16<<20))
	b.run(t)
	bystander := exec.Command("sleep", "600")
	if err := bystander.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = bystander.Process.Kill(); _ = bystander.Wait() })
	stop := make(chan struct{})
	done := journal(t, b.dev, stop)
	b.job.Quiesce = agent.Quiesce{Kind: "pid", Target: strconv.Itoa(bystander.Process.Pid)}
	good := 0
	const tries = 15
	for range tries {
		r, err := b.job.Run(t.Context())
		if errors.Is(err, agent.ErrPauseBudget) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if r.Point.Consistency != store.Crash {
			t.Errorf("consistency %s", r.Point.Consistency)
		}
		img := b.content(t, r.Point)
		head := binary.LittleEndian.Uint64(img[headAt:])
		record := binary.LittleEndian.Uint64(img[int64(head%slots)*slotSize:])
		if record < head {
			t.Errorf("TORN: the head names record %d, in its slot is %d (%+v)", head, record, r.Point.Quiesce)
		}
		if good++; good == 4 && os.Getenv("TIDEMARK_TESTVM") != "" {
			break // each takes seconds
		}
	}
	close(stop)
	<-done
	t.Logf("%d of %d backups found an instant", good, tries)
	if good == 0 {
		t.Error("no backup found an instant: nothing was tested")
	}
	if out, err := exec.Command("ps", "-o", "stat=", strconv.Itoa(bystander.Process.Pid)).Output(); err == nil && bytes.ContainsAny(out, "T") {
		t.Error("the bystander was left stopped")
	}
}
