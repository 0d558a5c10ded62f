package cbt_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

func quiet(t *testing.T, s cbt.Source) (bool, cbt.Evidence) {
	t.Helper()
	ok, e, err := s.Quiet()
	if err != nil {
		t.Fatal(err)
	}
	return ok, e
}

func TestQuietUntilSomebodyWrites(t *testing.T) {
	dev := loopDevice(t, small, "")
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	d := changes(t, s, cbt.ChangeID{})
	ok, e := quiet(t, s)
	if !ok || e.Device != d.Evidence.Device || e.FirstEpoch != d.Evidence.LastEpoch+1 || e.LastEpoch != e.FirstEpoch || e.Dirty != 0 || e.Sectors != 0 || e.Closed.Before(e.Opened) {
		t.Errorf("nothing was written: %v, %+v", ok, e)
	}
	write(t, dev, 5<<20)
	if ok, _ := quiet(t, s); ok {
		t.Error("quiet after a write")
	}
	// It closes no epoch: what was written is in the next delta, once.
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
		t.Errorf("got %s", describe(d))
	}
	if ok, _ := quiet(t, s); !ok {
		t.Error("not quiet after the swap")
	}
}

// What makes an epoch unknown makes it no quiet one, though nothing is marked in it.
func TestNotQuietWhenUnknown(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, s *cbt.Tracked, pins string, seam *bpf.Misses){
		"missed":   func(_ *testing.T, _ *cbt.Tracked, _ string, seam *bpf.Misses) { seam[0]++; seam[1]++; seam[2]++ },
		"distrust": func(_ *testing.T, s *cbt.Tracked, _ string, _ *bpf.Misses) { s.Distrust() },
		"detached": func(t *testing.T, _ *cbt.Tracked, pins string, _ *bpf.Misses) {
			if err := os.Remove(filepath.Join(pins, "gen-1", "link-rq_complete_0")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dev, pins := loopDevice(t, small, ""), pinDir(t)
			var seam bpf.Misses
			s := open(t, bpf.Options{Dir: pins, Misses: func(m bpf.Misses) bpf.Misses {
				for i := range m {
					m[i] += seam[i]
				}
				return m
			}}, dev)
			changes(t, s, cbt.ChangeID{})
			if ok, _ := quiet(t, s); !ok {
				t.Fatal("not quiet to begin with")
			}
			spoil(t, s, pins, &seam)
			if ok, _ := quiet(t, s); ok {
				t.Error("quiet")
			}
		})
	}
}

func TestUntrackedIsQuietWhileNobodyCanWrite(t *testing.T) {
	file := untrackedFile(t)
	u := openUntracked(t, file)
	if ok, _ := quiet(t, u); ok {
		t.Error("quiet before it was handed out")
	}
	changes(t, u, cbt.ChangeID{})
	if ok, _ := quiet(t, u); !ok {
		t.Error("not quiet while nobody can write")
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if ok, _ := quiet(t, u); ok {
		t.Error("quiet though somebody can write")
	}
}
