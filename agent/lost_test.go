package agent_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/store"
)

// What the repository has lost of the last point is read from the disk again, and nothing else that has not changed.
func TestBackupReadsWhatTheRepositoryHasLost(t *testing.T) {
	b := newBench(t)
	first := b.run(t)
	packs, err := filepath.Glob(filepath.Join(b.repo.Location(), "packs/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	largest, size := "", int64(0)
	for _, p := range packs {
		if st, err := os.Stat(p); err == nil && st.Size() > size {
			largest, size = p, st.Size()
		}
	}
	p, err := os.ReadFile(largest)
	if err != nil {
		t.Fatal(err)
	}
	p[1<<20] ^= 1 // in a grain
	if err := os.WriteFile(largest, p, 0o600); err != nil {
		t.Fatal(err)
	}
	repair := func() store.PointRepair {
		rep, err := b.repo.Repair(t.Context(), []store.PointName{first.Point.Name()}, store.RepairOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return rep.Points[0]
	}
	if r := repair(); len(r.Lost) != 1 || r.Lost[0].Len != 64<<10 {
		t.Fatalf("lost: %+v", r)
	}
	b.write(t, 20<<20, []byte("changed"))
	next := b.run(t)
	d := next.Point.Disks[0]
	if d.Tracking.Mode != "tracked" || d.Stats.Read != 128<<10 || d.Stats.New != 128<<10 {
		t.Errorf("mode %s, read %d, new %d; %v", d.Tracking.Mode, d.Stats.Read, d.Stats.New, d.Tracking.Reasons)
	}
	if why := strings.Join(d.Tracking.Reasons, "\n"); !strings.Contains(why, "65536 bytes of the last point are lost") {
		t.Errorf("reasons: %s", why)
	}
	b.wantContent(t, next.Point)
	if r := repair(); !r.Damaged() || len(r.Lost) > 0 {
		t.Errorf("the first point is not healed: %+v", r)
	}
	if rep, err := b.repo.Verify(t.Context(), first.Point, true, nil); err != nil || !rep.OK() {
		t.Errorf("verify: %+v, %v", rep, err)
	}
}
