package cbt_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// truthSize is the size of the disks that are written to: smaller where all is
// emulated and each epoch reads most of it.
var truthSize = func() int64 {
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		return 24 << 20
	}
	return 96 << 20
}()

// truthTable makes two partitions, each a third of the disk.
func truthTable() string {
	n := truthSize / 512 / 3
	return fmt.Sprintf("label: gpt\nstart=2048, size=%d\nstart=%d, size=%d\n", n, 2048+n, n)
}

// truthLimits says how many epochs a round has, how long it goes on if it has five at
// least, and how many writes all rounds have. A
// round ends with a comparison; a loss that a later write heals can't be seen, so a
// long test has many rounds and not a long one.
func truthLimits(t *testing.T) (epochs int, limit time.Duration, writes uint64) {
	t.Helper()
	epochs, limit = 210, time.Hour
	if os.Getenv(fastEnv) != "" {
		epochs = 20
	}
	var err error
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		// How fast an emulated machine is, nobody knows.
		epochs, limit = 20, 6*time.Second
	}
	if v := os.Getenv("TIDEMARK_TRUTH_EPOCHS"); v != "" {
		if epochs, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	if v := os.Getenv(fastEnv); v != "" {
		if writes, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	return epochs, limit, writes
}

func testTruth(t *testing.T, d target) {
	dir, pins := t.TempDir(), pinDir(t)
	open := func() (*replica, func()) {
		r, closeReplica, err := openReplicaWith(bpf.Options{Dir: pins}, bpf.DefaultGranuleShift, dir, d.dev)
		if err != nil {
			t.Fatal(err)
		}
		return r, closeReplica
	}
	r, closeReplica := open()
	defer func() { closeReplica() }()
	epochs, limit, writes := truthLimits(t)
	var n tally
	var changed, sectors int64
	var rounds, all, missed, unknown int
	begin := time.Now()
	defer func() {
		// The matrix reads this line.
		t.Logf("TRUTH rounds=%d epochs=%d writes=%d trims=%d zeroes=%d written=%dMiB submitted=%dMiB deltas=%dMiB missed=%d unknown=%d took=%s",
			rounds, all, n.writes, n.trims, n.zeroes, n.bytes>>20, sectors>>11, changed>>20, missed, unknown, time.Since(begin).Round(time.Second))
	}()
	step := func() {
		x, err := r.step(t.Context())
		if err != nil {
			t.Fatalf("epoch %d: %v", all, err)
		}
		if r.tracker.Copies() == 1 && slices.ContainsFunc(x.Evidence.LeastMisses, func(n uint64) bool { return n > 0 }) {
			// As the next backup would. What the old programs missed up to their end is in one more delta.
			t.Logf("epoch %d: the only copy of a program missed events: %v", all, x.Evidence.LeastMisses)
			closeReplica()
			r, closeReplica = open()
			if _, err = r.step(t.Context()); err != nil || r.tracker.Copies() == 1 {
				t.Fatalf("%d copies, %v", r.tracker.Copies(), err)
			}
		} else if all > 0 && len(x.Unknown) > 0 {
			unknown++
			t.Errorf("epoch %d is unknown: %v (least misses of %v: %v)", all, x.Unknown, bpf.ProgramNames(), x.Evidence.LeastMisses)
		}
		all++
		changed += x.Extents.Bytes()
		sectors += int64(x.Evidence.Sectors)
	}
	for ; rounds == 0 || n.writes < writes; rounds++ {
		stop := writers(t, d)
		waitForWrites(t, r.src)
		for i, since := 0, time.Now(); i < epochs && (i < 5 || time.Since(since) < limit); i++ {
			step()
			time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
		}
		n.add(stop())
		if err := errors.Join(syncDevice(d.disk), syncDevice(d.parts[0]), syncDevice(d.parts[1])); err != nil {
			t.Fatal(err)
		}
		step()
		if bad := differing(t, dir, d.dev, 1<<bpf.DefaultGranuleShift); len(bad) > 0 {
			missed += len(bad)
			t.Fatalf("MISSED in round %d: %d granules differ, the first at %#x", rounds, len(bad), bad[0])
		}
		if t.Failed() {
			return
		}
	}
}

// waitForWrites waits until fio has started its jobs. A signal in the middle of
// that makes it hang.
func waitForWrites(t *testing.T, src cbt.Source) {
	t.Helper()
	first, err := src.Writes()
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < time.Minute; time.Sleep(200 * time.Millisecond) {
		n, err := src.Writes()
		if err != nil {
			t.Fatal(err)
		}
		if n > first+200 {
			return
		}
	}
	t.Error("hardly anything was written in a minute")
}

func syncDevice(dev string) error {
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return f.Sync()
}

// childEnv turns the test binary into the process that TestTruthSurvivesKill kills.
const childEnv = "TIDEMARK_TEST_REPLICA"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		os.Exit(replicaChild(strings.Split(spec, "|")))
	}
	if spec := os.Getenv(upgradeEnv); spec != "" {
		os.Exit(upgradeChild(strings.Split(spec, "|")))
	}
	os.Exit(m.Run())
}

// replicaChild takes deltas until it is killed, and prints a line for each.
func replicaChild(args []string) int {
	dir, pins, dev := args[0], args[1], args[2]
	r, _, err := openReplica(dir, pins, dev)
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	for {
		d, err := r.step(context.Background())
		if err != nil {
			fmt.Println("error", err)
			return 1
		}
		fmt.Printf("epoch %s unknown=%q\n", d.ID, d.Unknown)
	}
}

// A process that is killed at any moment loses nothing: the next one adopts
// the pinned epochs, and the replica still becomes equal, without a compare.
func TestTruthSurvivesKill(t *testing.T) {
	d := loopDisk(t)
	dev, dir, pins := d.dev, t.TempDir(), pinDir(t)
	stop := writers(t, d)
	time.Sleep(2 * time.Second) // fio hangs if it is ended while it begins
	epochs, unknown := 0, 0
	const kills = 15
	for i := range kills {
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), childEnv+"="+strings.Join([]string{dir, pins, dev}, "|"))
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		// After a few epochs, at a moment of no one's choosing.
		for n := 2 + rand.IntN(5); n > 0 && lines.Scan(); n-- {
			if strings.HasPrefix(lines.Text(), "error") {
				t.Error(lines.Text())
			}
			epochs++
			if !strings.Contains(lines.Text(), "unknown=[]") {
				unknown++
				if i > 0 || unknown > 1 {
					t.Error("not adopted: ", lines.Text())
				}
			}
		}
		time.Sleep(time.Duration(rand.IntN(40)) * time.Millisecond)
		_ = c.Process.Kill()
		for lines.Scan() {
			epochs++
		}
		_ = c.Wait()
	}
	stop()
	if err := errors.Join(syncDevice(dev), syncDevice(d.parts[0]), syncDevice(d.parts[1])); err != nil {
		t.Fatal(err)
	}
	r, closeReplica, err := openReplica(dir, pins, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer closeReplica()
	last, err := r.step(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(last.Unknown) > 0 {
		t.Error("the last epoch is unknown: ", last.Unknown)
	}
	t.Logf("%d epochs over %d kills", epochs, kills)
	if bad := differing(t, dir, dev, 1<<bpf.DefaultGranuleShift); len(bad) > 0 {
		t.Fatalf("MISSED: %d granules differ, the first at %#x", len(bad), bad[0])
	}
}
