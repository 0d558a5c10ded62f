package cbt_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// lossy is a seam: what was missed, in place of or besides what the kernel counts.
type lossy struct{ extra bpf.Misses }

func (l *lossy) instead(bpf.Misses) bpf.Misses { return l.extra }

func (l *lossy) besides(m bpf.Misses) bpf.Misses {
	for i := range m {
		m[i] += l.extra[i]
	}
	return m
}

// wantLinks checks that the evidence names the link of each program and copy that is attached.
func wantLinks(t *testing.T, e cbt.Evidence, copies int) {
	t.Helper()
	var got, want []string
	for _, id := range e.LinkIDs {
		l, err := link.NewFromID(link.ID(id))
		if err != nil {
			t.Fatalf("link %d: %v", id, err)
		}
		li, err := l.Info()
		_ = l.Close()
		if err != nil {
			t.Fatal(err)
		}
		p, err := ebpf.NewProgramFromID(li.Program)
		if err != nil {
			t.Fatal(err)
		}
		pi, err := p.Info()
		_ = p.Close()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, pi.Name)
	}
	for _, p := range bpf.ProgramNames() {
		for c := range copies {
			want = append(want, fmt.Sprintf("%s_%d", p, c))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("the evidence names links of %v, want %v", got, want)
	}
}

// Whichever program has missed an event: with one copy the epoch is unknown, and the next process
// attaches three, which lose nothing when one of them does.
func TestCopiesGrowAfterAMiss(t *testing.T) {
	needsUpgrade(t)
	for p, name := range bpf.ProgramNames() {
		t.Run(name, func(t *testing.T) {
			dev, pins := loopDevice(t, small, ""), pinDir(t)
			var l lossy
			o := bpf.Options{Dir: pins, Misses: l.instead}
			s := open(t, o, dev)
			id := changes(t, s, cbt.ChangeID{}).ID
			write(t, dev, 1<<20)
			d := changes(t, s, id)
			if len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
				t.Errorf("nothing was missed: %v, unknown because %v", d.Extents, d.Unknown)
			}
			wantLinks(t, d.Evidence, 1)

			l.extra[3*p] = 7
			if _, ev, err := s.Marks(d.ID); !errors.Is(err, cbt.ErrUnproven) || len(ev.Missed) != 3 || ev.Missed[p] != 7 {
				t.Errorf("an audit: %v, %v", ev.Missed, err)
			}
			d = changes(t, s, d.ID)
			wantUnknown(t, d, small, "dropped tracing events")
			if d.Evidence.LeastMisses[p] != 7 {
				t.Errorf("least misses %v", d.Evidence.LeastMisses)
			}
			if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
				t.Errorf("the epoch after the miss: %v", d.Unknown)
			}

			// A device is held: later. An audit does not do it either.
			for _, c := range []struct {
				adoptOnly bool
				why       string
			}{{true, "the next backup attaches more copies"}, {false, bpf.ErrBusy.Error()}} {
				tr, err := bpf.Open(bpf.Options{Dir: pins, Misses: l.instead, AdoptOnly: c.adoptOnly})
				if err != nil {
					t.Fatal(err)
				}
				if tr.Copies() != 1 || !strings.Contains(tr.Outdated(), c.why) || tr.Grown() != "" {
					t.Errorf("%d copies, outdated %q, grown %q; want %q", tr.Copies(), tr.Outdated(), tr.Grown(), c.why)
				}
				_ = tr.Close()
			}
			write(t, dev, 2<<20)
			_ = s.Close()
			s = open(t, o, dev)
			write(t, dev, 3<<20)
			d = changes(t, s, d.ID)
			if want := (cbt.Extents{{Off: 2 << 20, Len: 64 << 10}, {Off: 3 << 20, Len: 64 << 10}}); len(d.Unknown) > 0 || !slices.Equal(d.Extents, want) {
				t.Errorf("across the change: %v, unknown because %v", d.Extents, d.Unknown)
			}
			wantLinks(t, d.Evidence, 3)

			l.extra[3*p]++
			l.extra[3*p+1]++
			if d = changes(t, s, d.ID); len(d.Unknown) > 0 || d.Evidence.LeastMisses[p] != 0 {
				t.Errorf("the third copy saw all: unknown because %v, least misses %v", d.Unknown, d.Evidence.LeastMisses)
			}
			_ = s.Close()
			// Never back, also where it misses nothing and is of another version.
			for variant := range uint32(2) {
				tr, err := bpf.Open(bpf.Options{Dir: pins, Variant: variant})
				if err != nil {
					t.Fatal(err)
				}
				if tr.Copies() != 3 || tr.Outdated() != "" || !strings.Contains(tr.Grown(), "the only one of "+name+" had missed 7 events") {
					t.Errorf("%d copies, outdated %q, grown %q", tr.Copies(), tr.Outdated(), tr.Grown())
				}
				_ = tr.Close()
			}
		})
	}
}

// Epochs of one copy and of three, merged by backups that failed: each tells its own least.
func TestLeastMissesOfMergedEpochs(t *testing.T) {
	needsUpgrade(t)
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	var l lossy
	o := bpf.Options{Dir: pins, Misses: l.instead}
	s := open(t, o, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	l.extra[0] = 7
	changes(t, s, id)
	_ = s.Close()
	s = open(t, o, dev)
	l.extra[0], l.extra[1] = 100, 50
	var d cbt.Delta
	for range 10 {
		d = changes(t, s, id)
	}
	wantUnknown(t, d, small, "dropped tracing events")
	if d.Evidence.LeastMisses[0] != 7 {
		t.Errorf("least misses %v", d.Evidence.LeastMisses)
	}
}

// An event is missed while fio writes: one delta is unknown, then three copies take over and nothing
// is lost.
func TestTruthSurvivesMoreCopies(t *testing.T) {
	needsUpgrade(t)
	for _, k := range kinds {
		switch k.name {
		case "loop", "zram", "nvme", "dm-delay":
		default:
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			d := k.open(t)
			if k.refused != nil && k.refused() != "" {
				t.Skip("SKIP: it is not tracked on this kernel: ", k.refused())
			}
			rounds := 6
			if os.Getenv("TIDEMARK_TESTVM") != "" {
				rounds = 2 // emulated
			}
			for round := range rounds {
				truthSurvivesMoreCopies(t, d, pinDir(t)+fmt.Sprint("-", round), 3*(round%3))
			}
		})
	}
}

func truthSurvivesMoreCopies(t *testing.T, d target, pins string, missed int) {
	defer func() {
		if err := bpf.Remove(pins); err != nil {
			t.Error(err)
		}
	}()
	dir := t.TempDir()
	var l lossy
	o := bpf.Options{Dir: pins, Misses: l.besides}
	stop := writers(t, d)
	time.Sleep(2 * time.Second) // until fio has started its jobs
	r, closeReplica, err := openReplicaWith(o, bpf.DefaultGranuleShift, dir, d.dev)
	if err != nil {
		t.Fatal(err)
	}
	step := func() cbt.Delta {
		x, err := r.step(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	for range 3 {
		step()
	}
	if r.tracker.Copies() != 1 {
		t.Errorf("it begins with %d copies", r.tracker.Copies())
	}
	l.extra[missed]++
	if x := step(); len(x.Unknown) == 0 {
		t.Error("the only copy missed an event, and the epoch is believed")
	}
	closeReplica()
	if r, closeReplica, err = openReplicaWith(o, bpf.DefaultGranuleShift, dir, d.dev); err != nil {
		t.Fatal(err)
	}
	defer closeReplica()
	if r.tracker.Copies() != 3 {
		t.Errorf("%d copies, outdated %q", r.tracker.Copies(), r.tracker.Outdated())
	}
	for n := range 5 {
		l.extra[missed]++ // the others see it
		if x := step(); len(x.Unknown) > 0 {
			t.Errorf("delta %d after the change: %v", n, x.Unknown)
		}
	}
	wrote := stop()
	if err := syncDevice(d.disk); err != nil {
		t.Fatal(err)
	}
	if x := step(); len(x.Unknown) > 0 {
		t.Errorf("the last epoch: %v", x.Unknown)
	}
	if at := differing(t, dir, d.dev, 64<<10); len(at) > 0 {
		t.Errorf("MISSED: %d granules differ, the first at %#x", len(at), at[0])
	}
	t.Logf("%d writes and %d discards and zeroes", wrote.writes, wrote.trims+wrote.zeroes)
}

// bioBased is a small device whose writes complete as bios.
func bioBased(t *testing.T) string {
	if rwPage() == "" {
		return zramDevice(t, small)
	}
	return delayDevice(t, small, time.Millisecond)
}

// The last copy that is attached gives the place in the table of writes in flight back.
func TestWritesInFlightAreGivenBack(t *testing.T) {
	for _, copies := range []int{1, 2, 3} {
		t.Run(fmt.Sprint(copies), func(t *testing.T) {
			dev, pins := bioBased(t), pinDir(t)
			s := open(t, bpf.Options{Dir: pins, Copies: copies}, dev)
			id := changes(t, s, cbt.ChangeID{}).ID
			for off := int64(0); off < small; off += 1 << 20 {
				write(t, dev, off)
			}
			if d := changes(t, s, id); len(d.Unknown) > 0 || len(d.Extents) != 8 {
				t.Errorf("%v, unknown because %v", d.Extents, d.Unknown)
			}
			m, err := ebpf.LoadPinnedMap(filepath.Join(pins, "gen-1", "map-inflight"), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = m.Close() }()
			keys, entries := make([]uint32, m.MaxEntries()), make([][3]uint64, m.MaxEntries())
			var at ebpf.MapBatchCursor
			if _, err := m.BatchLookup(&at, keys, entries, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				t.Fatal(err)
			}
			for _, e := range entries {
				if e[0] != 0 {
					t.Errorf("a write is in flight still: %x", e)
				}
			}
		})
	}
}

// The only copy missed a completion, which leaves an entry behind, and a submission: where a bio that
// completes later wrote is uncertain until other programs take over, not in that epoch alone. Disks that
// complete requests have no such entries.
func TestUnknownAfterMissesAtBothEnds(t *testing.T) {
	needsUpgrade(t)
	dev, pins := bioBased(t), pinDir(t)
	var l lossy
	o := bpf.Options{Dir: pins, Misses: l.instead}
	s := open(t, o, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	l.extra[0], l.extra[6] = 1, 1
	for range 3 {
		d := changes(t, s, id)
		wantUnknown(t, d, small, "dropped tracing events")
		id = d.ID
	}
	_ = s.Close()
	s = open(t, o, dev)
	d := changes(t, s, id)
	wantUnknown(t, d, small, "dropped tracing events") // up to the end of the old programs
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
		t.Errorf("three copies: unknown because %v", d.Unknown)
	}
}
