package store

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/faultblob"
	"github.com/tidemark/tidemark/store/blob/s3"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

func TestMain(m *testing.M) {
	argon2Cost = argon2Params{Time: 1, Memory: 8, Threads: 1}
	faultblob.Main(map[string]faultblob.Job{"operation": operationJob})
	_ = flag.Set("rapid.checks", "25") // the command line still wins
	os.Exit(m.Run())
}

const (
	crashSize   = 5 << 20 // two levels
	crashGrain  = 4096
	crashWrites = 16

	crashDataPack, crashNodePack = 32 << 10, 2 << 10
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

// crashRepo opens the repository with a fault layer below it.
func crashRepo(ctx context.Context, l *faultblob.Layer, location string) (*Repo, error) {
	p, err := parseLocation(location)
	if err != nil {
		return nil, err
	}
	var b blob.Store
	if p.dir == "" {
		b, err = s3.Open(ctx, p.s3, s3.Options{Wrap: func(d s3.Doer) s3.Doer { return l.Requests(d) }})
	} else {
		b, err = p.open(ctx)
	}
	if err != nil {
		return nil, err
	}
	if d, ok := b.(*blob.Dir); ok {
		l.Watch(d)
	}
	return openSmall(ctx, l.Over(b), location)
}

// openSmall opens the repository in b, whose packs will be small.
func openSmall(ctx context.Context, b blob.Store, location string) (*Repo, error) {
	r, err := openOn(ctx, b, location, testKey()...)
	if err != nil {
		return nil, err
	}
	r.dataPackLen, r.nodePackLen = crashDataPack, crashNodePack
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

// everyMomentEnv asks for kills at every moment ("make crash"). Without it they are at a few, others
// in each run: starting a process for each takes minutes.
const everyMomentEnv = "TIDEMARK_TEST_EVERY_MOMENT"

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
	s := newStage(t, operationOf("backup"))
	location := s.repo.Location()
	began := time.Now()
	said := faultblob.Run(t, 0, "operation", "backup", "", location).Said
	whole := time.Since(began) // so long a run takes here, now
	for i := range 12 {
		said = append(said, faultblob.RunFor(t, whole/20+rand.N(whole), "operation", "backup", "", location).Said...)
		if i%3 == 2 {
			s.check(t, location, said, false)
		}
	}
	t.Logf("%d points acknowledged", len(said))
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
