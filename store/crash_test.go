package store

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// crashEnv makes the test binary a child that backs up until it is killed:
// "REPO OP PHASE", where OP is the number of the Put to die in (0: never).
const crashEnv = "TIDEMARK_TEST_CRASH"

func TestMain(m *testing.M) {
	argon2Cost = argon2Params{Time: 1, Memory: 8, Threads: 1}
	if job := os.Getenv(crashEnv); job != "" {
		if err := crashChild(context.Background(), job); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	_ = flag.Set("rapid.checks", "25") // the command line still wins
	os.Exit(m.Run())
}

const (
	crashSize   = 5 << 20 // two levels
	crashGrain  = 4096
	crashWrites = 16
)

// crashImage is the disk after so many backups, and crashPut does the writes of one.
func crashImage(n int) []byte {
	image := make([]byte, crashSize)
	for i := 1; i <= n; i++ {
		crashPut(i, func(off int64, p []byte) { copy(image[off:], p) })
	}
	return image
}

func crashPut(n int, put func(off int64, p []byte)) {
	rnd := rand.New(rand.NewPCG(uint64(n), 77))
	for i := range crashWrites {
		off := rnd.Int64N(crashSize/crashGrain-4) * crashGrain
		p := noise(uint64(n*1000+i), crashGrain*(1+rnd.IntN(4)))
		if rnd.IntN(5) == 0 {
			clear(p)
		}
		put(off, p)
	}
}

// crashChild makes point after point and says so when each is committed.
func crashChild(ctx context.Context, job string) error {
	var op int
	var phase, location string
	if _, err := fmt.Sscan(job, &location, &op, &phase); err != nil {
		return err
	}
	r, err := testOpen(ctx, location)
	if err != nil {
		return err
	}
	r.dataPackLen, r.nodePackLen = 32<<10, 2<<10
	f := over(r)
	die := func(n int, when string) {
		if n == op && when == phase {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	f.before = func(n int, _ string) error { die(n, "before"); return nil }
	f.middle = func(n int) { die(n, "middle") }
	f.after = func(n int) { die(n, "after") }

	for range 2 {
		p, err := crashBackup(ctx, r)
		if err != nil {
			return err
		}
		fmt.Println("ack", p.Disks[0].ChangeID, p.ID)
	}
	fmt.Println("end", f.n)
	return nil
}

func crashBackup(ctx context.Context, r *Repo) (*Point, error) {
	w, err := r.Begin(ctx, "a")
	if err != nil {
		return nil, err
	}
	defer func() { _ = w.Abort() }()
	n := 1
	if w.Parent() != nil {
		last, err := strconv.Atoi(w.Parent().Disks[0].ChangeID)
		if err != nil {
			return nil, err
		}
		n = last + 1
	}
	d, err := w.Disk(ctx, DiskOptions{Name: "disk0", Size: crashSize, Grain: crashGrain})
	if err != nil {
		return nil, err
	}
	crashPut(n, func(off int64, p []byte) { err = errors.Join(err, d.Write(ctx, off, p)) })
	if err != nil {
		return nil, err
	}
	p := testPoint("disk0")
	p.Disks[0].ChangeID = strconv.Itoa(n)
	return w.Commit(ctx, p)
}

// runChild starts a child and returns the IDs it acknowledged, by number, and
// how many Puts it did if it came to its end. If killAfter is not 0 it is killed
// then.
func runChild(t *testing.T, job string, killAfter time.Duration) (acks map[int]string, puts int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), crashEnv+"="+job)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if killAfter > 0 {
		timer := time.AfterFunc(killAfter, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
	}
	acks = map[int]string{}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var n int
		var id string
		switch line := lines.Text(); {
		case strings.HasPrefix(line, "ack "):
			if _, err := fmt.Sscanf(line, "ack %d %s", &n, &id); err != nil {
				t.Fatal(err)
			}
			acks[n] = id
		case strings.HasPrefix(line, "end "):
			if _, err := fmt.Sscanf(line, "end %d", &puts); err != nil {
				t.Fatal(err)
			}
		default:
			t.Errorf("child: %s", line)
		}
	}
	_, _ = io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("child: %v\n%s", err, stderr.String())
		}
	}
	return acks, puts
}

// checkAfterCrash opens the repository as any reader would. Every acknowledged
// point must be there, and every point that is there must be whole and right.
func checkAfterCrash(t *testing.T, location string, acks map[int]string) {
	t.Helper()
	r, err := testOpen(t.Context(), location)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	names, err := r.Points(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]string{}
	for i, name := range names {
		p, err := r.Point(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(p.Disks[0].ChangeID)
		if err != nil || n != i+1 {
			t.Fatalf("point %d has change ID %q", i, p.Disks[0].ChangeID)
		}
		seen[n] = p.ID
		wantClean(t, r, p)
		if i >= len(names)-2 {
			wantDisk(t, r, p, crashImage(n))
		}
	}
	for n, id := range acks {
		if seen[n] != id {
			t.Errorf("point %d (%s) was acknowledged and is lost; there are %v", n, id, seen)
		}
	}
}

func TestKilledInEveryPut(t *testing.T) {
	t.Parallel()
	dry := initAt(t)
	acks, puts := runChild(t, dry+" 0 never", 0)
	if len(acks) != 2 || puts < 10 {
		t.Fatalf("dry run: %d points, %d puts", len(acks), puts)
	}
	checkAfterCrash(t, dry, acks)
	t.Logf("%d puts", puts)
	for _, phase := range []string{"before", "middle", "after"} {
		t.Run(phase, func(t *testing.T) {
			t.Parallel()
			for op := 1; op <= puts; op++ {
				location := initAt(t)
				acks, end := runChild(t, fmt.Sprintf("%s %d %s", location, op, phase), 0)
				if end != 0 {
					t.Fatalf("the child was not killed %s put %d", phase, op)
				}
				checkAfterCrash(t, location, acks)
				if op%4 == 0 { // the next run goes on where that one died
					more, _ := runChild(t, location+" 0 never", 0)
					for n, id := range more {
						acks[n] = id
					}
					checkAfterCrash(t, location, acks)
				}
				if t.Failed() {
					t.Fatalf("killed %s put %d", phase, op)
				}
			}
		})
	}
}

func TestKilledAtRandomMoments(t *testing.T) {
	t.Parallel()
	location := initAt(t)
	all := map[int]string{}
	rnd := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	for i := range 12 {
		acks, _ := runChild(t, location+" 0 never", time.Duration(5+rnd.IntN(120))*time.Millisecond)
		for n, id := range acks {
			all[n] = id
		}
		if i%3 == 2 {
			checkAfterCrash(t, location, all)
		}
	}
	t.Logf("%d points acknowledged", len(all))
}

func initAt(t *testing.T) string {
	t.Helper()
	r, err := testInit(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	return r.Location()
}
