package store

import (
	"math"
	"os"
	"path/filepath"
	"testing"
)

func TestSampleIsDrawnByItsSeed(t *testing.T) {
	r := testRepo(t)
	const grains = 512
	p := backup(t, r, DiskOptions{Size: grains * 4096, Grain: 4096}, write{0, noise(1, grains*4096)})
	read := func(part float64, seed uint64) VerifyReport {
		rep, err := r.VerifySample(t.Context(), p, Sample{part, seed}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return rep
	}
	for part, want := range map[float64]int64{0: 0, 1: grains} {
		if rep := read(part, 7); rep.Read != want || rep.Grains != grains || rep.Bytes != want*4096 {
			t.Errorf("a sample of %v: %+v", part, rep)
		}
	}
	sum, differs := int64(0), false
	for seed := range uint64(40) {
		a, b := read(0.1, seed), read(0.1, seed)
		if a.Read != b.Read {
			t.Errorf("seed %d draws %d grains, then %d", seed, a.Read, b.Read)
		}
		differs = differs || a.Read != read(0.1, seed+1).Read
		sum += a.Read
	}
	// 20480 draws at 0.1: six standard deviations.
	if mean, dev := 0.1*40*grains, math.Sqrt(40*grains*0.1*0.9); math.Abs(float64(sum)-mean) > 6*dev || !differs {
		t.Errorf("40 samples of 10 %% hold %d grains, not about %.0f; seeds differ: %v", sum, mean, differs)
	}
	for _, part := range []float64{-0.1, 1.1, math.NaN()} {
		if _, err := r.VerifySample(t.Context(), p, Sample{Part: part}, nil); err == nil {
			t.Errorf("a sample of %v was taken", part)
		}
	}
	// Damage in one grain is found by just the seeds that draw it.
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := m.Lookup(t.Context(), 99)
	if err != nil {
		t.Fatal(err)
	}
	e, err := r.locate(t.Context(), ref, kindData)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(r.Location(), packName(ref.Pack))
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	flip(t, file, int(e.off)*8+9)
	found := 0
	for seed := range uint64(40) {
		s := Sample{0.3, seed}
		rep := read(0.3, seed)
		if rep.OK() == s.has(ref.Hash) {
			t.Errorf("seed %d: drawn: %v, problems: %+v", seed, s.has(ref.Hash), rep.Problems)
		}
		if !rep.OK() {
			found++
		}
	}
	if found == 0 || found == 40 {
		t.Errorf("found by %d seeds of 40", found)
	}
}

// What points share is read once, and damage of it is told of each of them; also of one whose document is damaged.
func TestVerificationReadsWhatIsSharedOnce(t *testing.T) {
	r := testRepo(t)
	const grains = 64
	first := backup(t, r, DiskOptions{Size: grains * 4096, Grain: 4096}, write{0, noise(1, grains*4096)})
	second := backup(t, r, DiskOptions{Size: grains * 4096, Grain: 4096}, write{0, noise(2, 4*4096)})
	verify := func(n PointName) VerifyReport {
		t.Helper()
		v, err := r.NewVerification()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.Point(t.Context(), first.Name(), nil); err != nil {
			t.Fatal(err)
		}
		rep, err := v.Point(t.Context(), n, nil)
		if err != nil {
			t.Fatal(err)
		}
		return rep
	}
	if rep := verify(second.Name()); !rep.OK() || rep.Grains != grains || rep.Read != 4 || rep.Shared != grains-4 || rep.Bytes != 4*4096 {
		t.Errorf("the second: %+v", rep)
	}
	damageGrain(t, r, first, 9)
	r = reopen(t, r)
	if rep := verify(second.Name()); len(rep.Problems) != 1 || rep.Problems[0].Off != 9*4096 || rep.Problems[0].Len != 4096 {
		t.Errorf("the second with damage that it shares: %+v", rep)
	}
	flip(t, filepath.Join(r.Location(), r.pointObject(second.Name())), 900)
	if rep := verify(second.Name()); len(rep.Problems) != 1 || rep.Problems[0].Object != r.pointObject(second.Name()) {
		t.Errorf("its document is damaged: %+v", rep)
	}
}
