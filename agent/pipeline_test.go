package agent

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/cbt"
)

func TestLimitsAreKept(t *testing.T) {
	for name, c := range map[string]struct {
		l     Limits
		n     int64 // of each read
		reads int
		least time.Duration
	}{
		"bytes": {Limits{BytesPerSecond: 8 << 20}, readChunk, 5, 450 * time.Millisecond}, // the first is free
		"iops":  {Limits{IOPS: 20}, 4096, 11, 450 * time.Millisecond},
	} {
		for _, shared := range []bool{false, true} {
			own, all := c.l, Limits{}
			if shared {
				own, all = all, own
			}
			l := &lane{Pipeline: NewPipeline(all), own: newThrottle(own)}
			begin := time.Now()
			for range c.reads {
				_, giveBack, err := l.admit(t.Context(), c.n)
				if err != nil {
					t.Fatal(err)
				}
				giveBack()
			}
			if took := time.Since(begin); took < c.least {
				t.Errorf("%s, shared %v: %d reads took %v", name, shared, c.reads, took)
			}
		}
	}
}

func TestPiecesAtOnceAreBounded(t *testing.T) {
	p := NewPipeline(Limits{})
	for range sharedReads {
		l := &lane{Pipeline: p}
		if _, _, err := l.admit(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	l := &lane{Pipeline: p}
	if _, _, err := l.admit(ctx, 1); err == nil {
		t.Error("one more was let in")
	}
	if _, err := l.hold(ctx, sharedHeld+1); err == nil {
		t.Error("more may be held than there is")
	}
}

func TestIOPriorityOfAllThreads(t *testing.T) {
	for s, want := range map[string]IOPriority{"idle": 3 << 13, "best-effort": 2<<13 | 4, "best-effort:7": 2<<13 | 7} {
		p, err := ParseIOPriority(s)
		if err != nil || p != want {
			t.Errorf("%s: %#x, %v", s, p, err)
		}
	}
	for _, s := range []string{"", "realtime", "idle:1", "best-effort:8", "best-effort:", "best-effort:-1"} {
		if _, err := ParseIOPriority(s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
	before, _, _ := unix.Syscall(unix.SYS_IOPRIO_GET, ioprioWhoProcess, 0, 0)
	defer func() { _ = IOPriority(before).Apply() }()
	if err := IOPriority(ioprioBestEffort | 6).Apply(); err != nil {
		t.Fatal(err)
	}
	got := make(chan uintptr)
	go func() { // a thread that was there, or a new one
		runtime.LockOSThread()
		p, _, _ := unix.Syscall(unix.SYS_IOPRIO_GET, ioprioWhoProcess, 0, 0)
		got <- p
	}()
	if p := <-got; p != ioprioBestEffort|6 {
		t.Errorf("%#x", p)
	}
}

func TestWithout(t *testing.T) {
	const size = 64
	mask := func(x cbt.Extents) (m uint64) {
		for _, e := range x {
			for i := e.Off; i < e.Off+e.Len; i++ {
				m |= 1 << i
			}
		}
		return m
	}
	ext := func(m uint64) (x cbt.Extents) {
		for i := range int64(size) {
			if m>>i&1 == 0 {
				continue
			}
			if n := len(x); n > 0 && x[n-1].Off+x[n-1].Len == i {
				x[n-1].Len++
			} else {
				x = append(x, cbt.Extent{Off: i, Len: 1})
			}
		}
		return x
	}
	seed := uint64(88172645463325252)
	next := func() uint64 { seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17; return seed }
	for range 2000 {
		a := next() | next()<<1
		b := next() & (next() >> 1)
		got := without(ext(a), ext(b))
		if mask(got) != a&^b || len(got) != len(ext(a&^b)) {
			t.Fatalf("%064b without %064b is %v", a, b, got)
		}
	}
	if x := without(cbt.Whole(size), without(cbt.Whole(size), nil)); x != nil {
		t.Error(x)
	}
}

func TestHolesAreWhatReadsAsZeroes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	const size = 8<<20 + 5000
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 3<<20 + 100, 5 << 20} {
		if _, err := f.WriteAt([]byte("data"), off); err != nil { // in the page cache alone
			t.Fatal(err)
		}
	}
	d, err := openDevice(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.f.Close() }()
	const unit = 64 << 10
	x := cbt.Extents{{Off: 0, Len: 4 << 20}, {Off: 5 << 20, Len: size - 5<<20}}
	holes, err := d.holes(x, unit)
	if err != nil {
		t.Fatal(err)
	}
	if holes.Bytes() != size-1<<20-3*unit {
		t.Errorf("%d bytes of holes: %v", holes.Bytes(), holes)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range holes {
		if h.Off%unit != 0 || h.Len%unit != 0 && h.Off+h.Len != size {
			t.Errorf("%v is not whole units", h)
		}
		for _, c := range b[h.Off : h.Off+h.Len] {
			if c != 0 {
				t.Fatalf("data in the hole %v", h)
			}
		}
	}
	d.file = false
	if holes, err := d.holes(x, unit); err != nil || holes != nil {
		t.Errorf("a device has holes: %v, %v", holes, err)
	}
}
