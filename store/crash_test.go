package store

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/faultblob"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

func TestMain(m *testing.M) {
	argon2Cost = argon2Params{Time: 1, Memory: 8, Threads: 1}
	faultblob.Main(map[string]faultblob.Job{"backup": crashJob, "resume": resumeJob, "repair": repairJob})
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

// crashJob makes point after point and says so when each is committed.
func crashJob(ctx context.Context, l *faultblob.Layer, say func(string), args []string) error {
	r, err := crashRepo(ctx, l, args[0])
	if err != nil {
		return err
	}
	for range 2 {
		p, err := crashBackup(ctx, r)
		if err != nil {
			return err
		}
		say(p.Disks[0].ChangeID + " " + p.ID)
	}
	return nil
}

// crashRepo opens the repository with a fault layer below it.
func crashRepo(ctx context.Context, l *faultblob.Layer, location string) (*Repo, error) {
	p, err := parseLocation(location)
	if err != nil {
		return nil, err
	}
	b, err := p.open(ctx)
	if err != nil {
		return nil, err
	}
	if d, ok := b.(*blob.Dir); ok {
		l.Watch(d)
	}
	r, err := openOn(ctx, l.Over(b), location, testKey()...)
	if err != nil {
		return nil, err
	}
	r.dataPackLen, r.nodePackLen = 32<<10, 2<<10
	return r, nil
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

// acked adds what a child said to the IDs that were acknowledged, by number.
func acked(t *testing.T, acks map[int]string, o faultblob.Outcome) {
	t.Helper()
	for _, line := range o.Said {
		var n int
		var id string
		if _, err := fmt.Sscan(line, &n, &id); err != nil {
			t.Fatal(err)
		}
		acks[n] = id
	}
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

// killShards is how many children run at once.
const killShards = 3

// killedEverywhere kills a child that makes two points at every moment at which it changes what is
// stored, each time in a new repository.
// everyMomentEnv asks for kills at every moment ("make crash"). Without it they are at a fifth of them, others
// in each run: starting a process for each takes minutes.
const everyMomentEnv = "TIDEMARK_TEST_EVERY_MOMENT"

// momentsOf returns the moments, of 1 to n, at which a shard is to be killed.
func momentsOf(t *testing.T, n, shard int64) (out []int64) {
	step := int64(killShards)
	if os.Getenv(everyMomentEnv) == "" {
		step *= 5
		shard += killShards * rand.Int64N(5)
	}
	for at := 1 + shard; at <= n; at += step {
		out = append(out, at)
	}
	t.Logf("killed at %d of %d moments, from %d", len(out), n, 1+shard)
	return out
}

func killedEverywhere(t *testing.T, init func(t *testing.T) (location string)) {
	dry := init(t)
	acks := map[int]string{}
	o := faultblob.Run(t, 0, "backup", dry)
	acked(t, acks, o)
	if len(acks) != 2 || o.Moments < 30 {
		t.Fatalf("dry run: %d points, %d moments", len(acks), o.Moments)
	}
	checkAfterCrash(t, dry, acks)
	t.Logf("%d moments", o.Moments)
	for shard := range int64(killShards) {
		t.Run(fmt.Sprint(shard), func(t *testing.T) {
			t.Parallel()
			survived := 0
			for i, at := range momentsOf(t, o.Moments, shard) {
				location := init(t)
				acks := map[int]string{}
				o := faultblob.Run(t, at, "backup", location)
				acked(t, acks, o)
				if o.Killed == "" {
					survived++ // uploads race: there may be fewer moments this time
				}
				checkAfterCrash(t, location, acks)
				if i%4 == 0 { // the next run goes on where that one died
					acked(t, acks, faultblob.Run(t, 0, "backup", location))
					checkAfterCrash(t, location, acks)
				}
				if t.Failed() {
					t.Fatalf("killed at %s", o.Killed)
				}
			}
			if survived > 2 {
				t.Errorf("%d children were not killed", survived)
			}
		})
	}
}

func TestKilledAtEveryMoment(t *testing.T) {
	t.Parallel()
	killedEverywhere(t, initAt)
}

func TestKilledAtEveryMomentOnS3(t *testing.T) {
	srv := s3test.Start(t)
	var n atomic.Int64
	killedEverywhere(t, func(t *testing.T) string {
		return initOnServer(t, srv, fmt.Sprintf("r%d", n.Add(1)))
	})
}

func initOnServer(t *testing.T, srv *s3test.Server, name string) string {
	t.Helper()
	r, err := testInit(t.Context(), "s3:"+srv.Endpoint+"/"+s3test.Bucket+"/"+name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	return r.Location()
}

func TestKilledAtRandomMoments(t *testing.T) {
	t.Parallel()
	location := initAt(t)
	all := map[int]string{}
	began := time.Now()
	acked(t, all, faultblob.Run(t, 0, "backup", location))
	whole := time.Since(began) // so long a run takes here, now
	for i := range 12 {
		acked(t, all, faultblob.RunFor(t, whole/20+rand.N(whole), "backup", location))
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
