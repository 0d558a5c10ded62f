package cbt_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

func needsUpgrade(t *testing.T) {
	t.Helper()
	if !bpf.CanUpgrade() {
		t.Skip("SKIP: this kernel preempts tracepoints (7.0 and later): the programs are not replaced; TestUpgradeIsPutOff runs there")
	}
}

// Where programs can't be replaced without a gap, those that are attached go on.
func TestUpgradeIsPutOff(t *testing.T) {
	if bpf.CanUpgrade() {
		t.Skip("SKIP: this kernel does not preempt tracepoints")
	}
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	tr, err := bpf.Open(bpf.Options{Dir: pins, Variant: 1})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(tr.Outdated(), "7.0") {
		t.Errorf("outdated because %q", tr.Outdated())
	}
	_ = tr.Close()
	write(t, dev, 1<<20)
	if d := changes(t, open(t, bpf.Options{Dir: pins, Variant: 1}, dev), id); len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
		t.Errorf("%v, unknown because %v", d.Extents, d.Unknown)
	}
}

// stepUnder feeds a replica of dev once, through a tracker of its own.
func stepUnder(ctx context.Context, o bpf.Options, dir, dev string) (cbt.Delta, error) {
	r, closeReplica, err := openReplicaWith(o, bpf.DefaultGranuleShift, dir, dev)
	if err != nil {
		return cbt.Delta{}, err
	}
	defer closeReplica()
	return r.step(ctx)
}

// Each epoch belongs to programs of another version, and nothing is lost between them.
func TestTruthSurvivesUpgrade(t *testing.T) {
	needsUpgrade(t)
	for _, k := range kinds {
		switch k.name {
		case "loop", "zram", "nvme", "dm-delay", "dm-thin":
		default:
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			d := k.open(t)
			if k.refused != nil && k.refused() != "" {
				t.Skip("SKIP: it is not tracked on this kernel: ", k.refused())
			}
			truthSurvivesUpgrade(t, d)
		})
	}
}

func truthSurvivesUpgrade(t *testing.T, d target) {
	devs := []string{d.disk}
	if d.parts[0] != d.disk {
		devs = append(devs, d.parts[0])
	}
	pins := pinDir(t)
	dirs := make([]string, len(devs))
	for i := range devs {
		dirs[i] = t.TempDir()
	}
	stop := writers(t, d)
	time.Sleep(2 * time.Second) // until fio has started its jobs
	upgrades := 24
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		upgrades = 5 // emulated
	}
	var changed int64
	for n := range upgrades {
		o := bpf.Options{Dir: pins, Variant: uint32(n), Copies: 3}
		for i, dev := range devs {
			if n > 0 && n%5 == 0 {
				continue // several upgrades in one delta
			}
			d, err := stepUnder(t.Context(), o, dirs[i], dev)
			if err != nil {
				t.Fatal(err)
			}
			if n > 0 && len(d.Unknown) > 0 {
				t.Errorf("%s after upgrade %d: unknown because %v", dev, n, d.Unknown)
			}
			changed += d.Extents.Bytes()
		}
		tr, err := bpf.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if why := tr.Outdated(); why != "" {
			t.Error("not upgraded: ", why)
		}
		_ = tr.Close()
		time.Sleep(time.Duration(rand.IntN(80)) * time.Millisecond)
	}
	wrote := stop()
	for i, dev := range devs {
		if err := syncDevice(dev); err != nil {
			t.Fatal(err)
		}
		if d, err := stepUnder(t.Context(), bpf.Options{Dir: pins, Variant: uint32(upgrades), Copies: 3}, dirs[i], dev); err != nil || len(d.Unknown) > 0 {
			t.Errorf("the last epoch: %v, unknown because %v", err, d.Unknown)
		}
		if at := differing(t, dirs[i], dev, 64<<10); len(at) > 0 {
			t.Errorf("MISSED: %s: %d granules differ, the first at %#x", dev, len(at), at[0])
		}
	}
	t.Logf("%d upgrades: %d writes and %d discards and zeroes, the deltas held %d MiB", upgrades, wrote.writes, wrote.trims+wrote.zeroes, changed>>20)
}

// upgradeEnv turns the test binary into a process that upgrades and dies at a step.
const upgradeEnv = "TIDEMARK_TEST_UPGRADE"

func upgradeChild(args []string) int {
	pins, step := args[0], args[1]
	variant, err := strconv.ParseUint(args[2], 10, 32)
	if err != nil {
		return 1
	}
	_, err = bpf.Open(bpf.Options{Dir: pins, Variant: uint32(variant), Step: func(s string) {
		fmt.Println(s)
		if s == step {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
	}})
	fmt.Println("error", err)
	return 1
}

var upgradeSteps = []string{"build", "show", "begin", "install", "publish", "retire", "detach", "done"}

// An upgrade that is killed at any step is undone or continued by whoever comes next, of
// the old version or the new, and the writes of all that time are there.
func TestUpgradeIsKilled(t *testing.T) {
	needsUpgrade(t)
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	variant := uint32(0)
	for _, step := range upgradeSteps {
		for _, next := range []string{"new", "old", "another"} {
			t.Run(step+"-"+next, func(t *testing.T) {
				write(t, dev, 1<<20)
				c := exec.Command(os.Args[0])
				c.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%s|%d", upgradeEnv, pins, step, variant+1))
				out, err := c.Output()
				if err == nil || strings.Contains(string(out), "error") || !strings.Contains(string(out), step) {
					t.Fatalf("%v: %s", err, out)
				}
				write(t, dev, 3<<20)
				switch next {
				case "new":
					variant++
				case "another":
					variant += 2
				}
				s := open(t, bpf.Options{Dir: pins, Variant: variant}, dev)
				write(t, dev, 5<<20)
				d := changes(t, s, id)
				want := cbt.Extents{{Off: 1 << 20, Len: 64 << 10}, {Off: 3 << 20, Len: 64 << 10}, {Off: 5 << 20, Len: 64 << 10}}
				if len(d.Unknown) > 0 || !slices.Equal(d.Extents, want) {
					t.Errorf("got %v, unknown because %v", d.Extents, d.Unknown)
				}
				if next == "another" && !d.Evidence.Earlier {
					t.Error("the evidence does not say that it rests on other programs too")
				}
				id = d.ID
				if err := s.Commit(id); err != nil {
					t.Error(err)
				}
				_ = s.Close()
				gens, err := filepath.Glob(filepath.Join(pins, "gen-*"))
				if err != nil || len(gens) != 1 {
					t.Errorf("generations %v, %v", gens, err)
				}
			})
		}
	}
}

// A backup that runs holds the old maps: the upgrade waits for it, and the new version
// works with the old programs meanwhile.
func TestUpgradeWaitsForARunningBackup(t *testing.T) {
	needsUpgrade(t)
	dev, other, pins := loopDevice(t, small, ""), loopDevice(t, small, ""), pinDir(t)
	held := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, held, cbt.ChangeID{}).ID

	tr, err := bpf.Open(bpf.Options{Dir: pins, Variant: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tr.Close() }()
	if !strings.Contains(tr.Outdated(), bpf.ErrBusy.Error()) {
		t.Errorf("outdated because %q", tr.Outdated())
	}
	s, err := cbt.OpenTracked(tr, other, 16)
	if err != nil {
		t.Fatal(err)
	}
	otherID := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	write(t, dev, 1<<20)
	write(t, other, 2<<20)
	d := changes(t, held, id)
	if len(d.Unknown) > 0 || d.Extents.Bytes() != 64<<10 {
		t.Errorf("the running backup: %v, unknown because %v", d.Extents, d.Unknown)
	}
	id = d.ID
	_ = held.Close()

	// Now nobody holds it. Those who have the old tracker open can't use it any more.
	write(t, dev, 3<<20)
	s = open(t, bpf.Options{Dir: pins, Variant: 1}, dev)
	if _, err := cbt.OpenTracked(tr, other, 16); err == nil || !strings.Contains(err.Error(), bpf.ErrDetached.Error()) {
		t.Errorf("the old tracker is used: %v", err)
	}
	if err := tr.Forget(bpf.Device{}); err == nil || !strings.Contains(err.Error(), bpf.ErrDetached.Error()) {
		t.Errorf("the old tracker forgets: %v", err)
	}
	if d = changes(t, s, id); len(d.Unknown) > 0 || !slices.Equal(d.Extents, cbt.Extents{{Off: 3 << 20, Len: 64 << 10}}) {
		t.Errorf("after the upgrade: %v, unknown because %v", d.Extents, d.Unknown)
	}
	s = open(t, bpf.Options{Dir: pins, Variant: 1}, other)
	if d = changes(t, s, otherID); len(d.Unknown) > 0 || !slices.Equal(d.Extents, cbt.Extents{{Off: 2 << 20, Len: 64 << 10}}) {
		t.Errorf("the other after the upgrade: %v, unknown because %v", d.Extents, d.Unknown)
	}
}

// What the old programs missed up to their end is in the point after the upgrade.
func TestUpgradeKeepsLosses(t *testing.T) {
	needsUpgrade(t)
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	var lost bool
	s = open(t, bpf.Options{Dir: pins, Variant: 1, Step: func(step string) { lost = lost || step == "retire" }, Misses: func(m bpf.Misses) bpf.Misses {
		if lost {
			m[0], m[1], m[2] = m[0]+1, m[1]+1, m[2]+1
		}
		return m
	}}, dev)
	wantUnknown(t, changes(t, s, id), small, "dropped tracing events")
}

// anotherLayout makes what is pinned that of a layout that this binary does not know.
func anotherLayout(t *testing.T, pins string) {
	t.Helper()
	meta, err := ebpf.LoadPinnedMap(filepath.Join(pins, "gen-1", "meta"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := meta.Put(uint32(0), uint64(0x5449_4445_4550_0000|9999)); err != nil {
		t.Fatal(err)
	}
	_ = meta.Close()
}

// A layout that this binary does not know can't be continued: the next point says so,
// also when another process attached the new tracker.
func TestUnknownAfterAnotherLayout(t *testing.T) {
	dev, pins := loopDevice(t, small, ""), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	anotherLayout(t, pins)

	if _, err := bpf.Open(bpf.Options{Dir: pins}); err == nil || !strings.Contains(err.Error(), bpf.ErrBusy.Error()) {
		t.Errorf("a running backup lost its pins: %v", err)
	}
	_ = s.Close()
	tr, err := bpf.Open(bpf.Options{Dir: pins})
	if err != nil {
		t.Fatal(err)
	}
	_ = tr.Close()
	s = open(t, bpf.Options{Dir: pins}, dev)
	wantUnknown(t, changes(t, s, id), small, "another map layout")
}
