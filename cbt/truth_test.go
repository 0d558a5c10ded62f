package cbt_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const truthSize = 96 << 20

// writers writes to the device in every way it knows until stop is called,
// which returns how many KiB fio counted. sector is the smallest write.
func writers(t *testing.T, dev, part1, part2, sector string) (stop func() uint64) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	common := []string{"--output-format=terse", "--terse-version=3", "--time_based", "--runtime=7200", "--norandommap", "--randrepeat=0", "--randseed=" + strconv.FormatUint(rand.Uint64()>>1, 10)}
	jobs := [][]string{
		{"--name=direct", "--filename=" + dev, "--rw=randwrite", "--bsrange=4k-256k", "--blockalign=4k", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rate_iops=600"},
		{"--name=sectors", "--filename=" + dev, "--rw=randwrite", "--bs=" + sector, "--direct=1", "--ioengine=psync", "--rate_iops=500", "--offset=48m", "--size=32m"},
		{"--name=buffered", "--filename=" + part2, "--rw=randwrite", "--bsrange=" + sector + "-64k", "--blockalign=" + sector, "--ioengine=psync", "--fsync=32", "--rate_iops=500"},
		{"--name=uring", "--filename=" + part1, "--rw=randwrite", "--bs=16k", "--direct=1", "--ioengine=io_uring", "--iodepth=4", "--rate_iops=500"},
		{"--name=trim", "--filename=" + dev, "--rw=randtrim", "--bsrange=4k-1m", "--blockalign=4k", "--direct=1", "--ioengine=psync", "--rate_iops=40"},
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var total uint64
	for _, j := range jobs {
		// SIGTERM and not SIGKILL: fio then ends its jobs and reports.
		c := exec.CommandContext(ctx, "fio", append(j, common...)...)
		c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
		c.WaitDelay = 20 * time.Second
		wg.Add(1)
		go func() {
			defer wg.Done()
			out, err := c.Output()
			n := fioWrites(out)
			mu.Lock()
			defer mu.Unlock()
			total += n
			if n == 0 && j[2] != "--rw=randtrim" {
				t.Errorf("fio %s wrote nothing: %v: %s", j[0], err, out)
			}
		}()
	}
	wg.Add(1)
	go func() {
		defer wg.Done()
		for n := 0; ctx.Err() == nil; n++ {
			off := rand.Int64N(truthSize/4096-256) * 4096
			c := exec.Command("blkdiscard", "-z", "-o", strconv.FormatInt(off, 10), "-l", strconv.Itoa(4096*(1+rand.IntN(255))), dev)
			if out, err := c.CombinedOutput(); err != nil {
				t.Errorf("write zeroes: %v: %s", err, out)
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return func() uint64 { cancel(); wg.Wait(); return total }
}

// fioWrites reads the number of writes and trims from terse output.
func fioWrites(out []byte) uint64 {
	for line := range strings.Lines(string(out)) {
		f := strings.Split(line, ";")
		if len(f) > 50 && f[0] == "3" {
			kb, _ := strconv.ParseUint(f[46], 10, 64) // total written, KiB
			return kb
		}
	}
	return 0
}

const truthTable = "label: gpt\nstart=2048, size=65536\nstart=67584, size=65536\n"

// Every block that was written is in some delta: a replica that is fed from
// the deltas alone equals the disk when the writers have stopped.
func TestTruth(t *testing.T) {
	// Loop completes requests, zram completes bios.
	t.Run("loop", func(t *testing.T) {
		dev := loopDevice(t, truthSize, truthTable)
		testTruth(t, dev, func() func() uint64 { return writers(t, dev, dev+"p1", dev+"p2", "512") })
	})
	// Writes stay in flight for long: what is not marked at completion is lost.
	t.Run("dm-delay", func(t *testing.T) {
		dev := delayDevice(t, truthSize, 25*time.Millisecond)
		testTruth(t, dev, func() func() uint64 { return writers(t, dev, dev, dev, "512") })
	})
	t.Run("zram", func(t *testing.T) {
		dev := zramDevice(t, truthSize)
		testTruth(t, dev, func() func() uint64 { return writers(t, dev, dev, dev, "4k") })
	})
}

func testTruth(t *testing.T, dev string, write func() (stop func() uint64)) {
	dir, pins := t.TempDir(), pinDir(t)
	r, closeReplica, err := openReplica(dir, pins, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer closeReplica()
	stop := write()

	var changed, sectors int64
	// fio takes a second to start its jobs.
	time.Sleep(2 * time.Second)
	begin := time.Now()
	epochs := 210
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		epochs = 40 // emulated, and each epoch reads most of the disk
	}
	if v := os.Getenv("TIDEMARK_TRUTH_EPOCHS"); v != "" {
		if epochs, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	for i := range epochs {
		d, err := r.step(t.Context())
		if err != nil {
			t.Fatalf("epoch %d: %v", i, err)
		}
		if i > 0 && len(d.Unknown) > 0 {
			t.Errorf("epoch %d is unknown: %v", i, d.Unknown)
		}
		changed += d.Extents.Bytes()
		sectors += int64(d.Evidence.Sectors)
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
	}
	took := time.Since(begin)
	kib := stop()
	if err := syncDevice(dev); err != nil {
		t.Fatal(err)
	}
	if _, err := r.step(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d epochs in %v: fio wrote %d MiB, the tracker saw %d MiB submitted, the deltas held %d MiB", epochs, took.Round(time.Millisecond), kib>>10, sectors>>11, changed>>20)
	if diff := firstDifference(t, dir, dev); diff != "" {
		t.Fatal("MISSED: ", diff)
	}
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
	dev := loopDevice(t, truthSize, truthTable)
	dir, pins := t.TempDir(), pinDir(t)
	stop := writers(t, dev, dev+"p1", dev+"p2", "512")
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
	if err := syncDevice(dev); err != nil {
		t.Fatal(err)
	}
	r, closeReplica, err := openReplica(dir, pins, dev)
	if err != nil {
		t.Fatal(err)
	}
	defer closeReplica()
	d, err := r.step(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Unknown) > 0 {
		t.Error("the last epoch is unknown: ", d.Unknown)
	}
	t.Logf("%d epochs over %d kills", epochs, kills)
	if diff := firstDifference(t, dir, dev); diff != "" {
		t.Fatal("MISSED: ", diff)
	}
}
