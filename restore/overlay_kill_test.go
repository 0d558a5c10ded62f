package restore_test

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// killChild names the overlay that this process shall write, if it is the child
// of the test below.
const killChild = "TIDEMARK_TEST_OVERLAY"

func TestMain(m *testing.M) {
	if path := os.Getenv(killChild); path != "" {
		if err := writeUntilKilled(path); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	if path := os.Getenv(hydrateChild); path != "" {
		fmt.Println(hydrateUntilKilled(path))
		os.Exit(1)
	}
	if path := os.Getenv(restoreChild); path != "" {
		fmt.Println(restoreSlowly(path))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const (
	killDisk  = 4<<20 + 512
	killBatch = 8 // writes from one sync to the next
)

// killStep is write i of the child: a zeroed range if value is 0.
func killStep(i int) (off, n int64, value byte) {
	rnd := rand.New(rand.NewPCG(uint64(i), 13))
	off = rnd.Int64N(killDisk)
	n = min(1+rnd.Int64N(1<<rnd.IntN(18)), killDisk-off)
	if rnd.IntN(4) > 0 {
		value = byte(1 + rnd.IntN(255))
	}
	return off, n, value
}

func killBase() disktest.Bytes { return disktest.Bytes(disktest.Content(killDisk, 14)) }

// writeUntilKilled goes through the steps from where the number of lines in PATH.acked
// says, and tells of each sync on standard output.
func writeUntilKilled(path string) error {
	o, err := restore.OpenOrCreateOverlay(path, killBase(), identity)
	if err != nil {
		return err
	}
	first, err := strconv.Atoi(os.Getenv(killChild + "_FROM"))
	if err != nil {
		return err
	}
	for batch := first; ; batch++ {
		for i := batch * killBatch; i < (batch+1)*killBatch; i++ {
			off, n, value := killStep(i)
			if value == 0 {
				err = o.Zero(off, n)
			} else {
				_, err = o.WriteAt(bytes.Repeat([]byte{value}, int(n)), off)
			}
			if err != nil {
				return err
			}
		}
		if err := o.Sync(); err != nil {
			return err
		}
		fmt.Printf("synced %d\n", batch)
	}
}

func TestOverlaySurvivesKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "overlay")
	model := bytes.Clone(killBase())
	next := 0 // first batch that is not known to be synced
	for round := range 8 {
		last := runAndKill(t, path, next, 1+rand.IntN(40))
		// What the child wrote after its last sync may be there or not.
		maybe := make([]bool, killDisk)
		for i := next * killBatch; i < (last+2)*killBatch; i++ {
			off, n, value := killStep(i)
			for k := off; k < off+n; k++ {
				if i < (last+1)*killBatch {
					model[k] = value
				} else {
					maybe[k] = true
				}
			}
		}
		next = last + 1
		o, err := restore.OpenOverlay(path, killBase(), identity)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		got := make([]byte, killDisk)
		if _, err := o.ReadAt(got, 0); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := o.Close(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		for k := range got {
			if got[k] != model[k] && !maybe[k] {
				t.Fatalf("round %d: after sync %d byte %d is %#x, want %#x", round, last, k, got[k], model[k])
			}
		}
		// From here on what is there counts.
		model = got
	}
}

// runAndKill starts a child at batch from and kills it some time after it told of so many
// syncs. It returns the last batch that the child told of.
func runAndKill(t *testing.T, path string, from, syncs int) int {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), killChild+"="+path, fmt.Sprintf("%s_FROM=%d", killChild, from))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	last := from - 1
	lines := bufio.NewScanner(out)
	for seen := 0; lines.Scan(); {
		number, ok := strings.CutPrefix(lines.Text(), "synced ")
		if !ok {
			t.Fatalf("child says %q", lines.Text())
		}
		if last, err = strconv.Atoi(number); err != nil {
			t.Fatal(err)
		}
		if seen++; seen == syncs {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || last < from {
		t.Fatalf("child ended by itself after sync %d: %v", last, err)
	}
	return last
}
