package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/faultblob"
	"github.com/tidemark/tidemark/store/blob/s3"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

// faultyOpen opens the objects at a location so that using them fails now and then.
type faultyOpen func(t *testing.T, location string, seed uint64) blob.Store

func openPlain(t *testing.T, location string) blob.Store {
	t.Helper()
	p, err := parseLocation(location)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func below(h func(seed uint64) faultblob.Handler) faultyOpen {
	return func(t *testing.T, location string, seed uint64) blob.Store {
		return faultblob.New(h(seed)).Over(openPlain(t, location))
	}
}

func openFailingDisk(t *testing.T, location string, seed uint64) blob.Store {
	d := openPlain(t, location).(*blob.Dir)
	faultblob.New(faultblob.Random(seed, 120)).Watch(d)
	return d
}

func overBadNetwork(oneIn int, patience time.Duration) faultyOpen {
	return func(t *testing.T, location string, seed uint64) blob.Store {
		t.Helper()
		p, err := parseLocation(location)
		if err != nil {
			t.Fatal(err)
		}
		if p.dir != "" {
			return openPlain(t, location)
		}
		w := s3test.NewNetwork(s3test.Randomly(seed, oneIn))
		b, err := s3.Open(t.Context(), p.s3, s3.Options{Wrap: w.Wrap, RetryFor: patience})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

// Backing up, reading and verifying over storage that fails: what fails says so, is
// never taken for damage, and leaves no half point; what is told as done is done.
func TestOverFaultyStorage(t *testing.T) {
	random := func(seed uint64) faultblob.Handler { return faultblob.Random(seed, 120) }
	disorder := func(seed uint64) faultblob.Handler { return faultblob.Delays(seed, time.Millisecond) }
	both := func(seed uint64) faultblob.Handler { return faultblob.All(disorder(seed), random(seed)) }
	const must, may = true, false
	var srv *s3test.Server
	if _, err := s3test.Find(); err == nil {
		srv = s3test.Start(t)
	}
	for i, tt := range []struct {
		name string
		on   string
		open faultyOpen
		fail bool // some backups must fail, else nothing was tried
	}{
		{"dir, random", "dir", below(random), must},
		{"dir, disorder", "dir", below(disorder), may},
		{"dir, random in disorder", "dir", below(both), must},
		{"dir, failing disk", "dir", openFailingDisk, must},
		{"s3, random in disorder", "s3", below(both), must},
		{"s3, bad network", "s3", overBadNetwork(30, time.Minute), may},
		{"s3, bad network, no patience", "s3", overBadNetwork(40, time.Nanosecond), must},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			location := ""
			switch {
			case tt.on == "dir":
				location = initAt(t)
			case srv == nil:
				t.Skip(`SKIP: no S3 server: build it with "make bin/versitygw"`)
			default:
				location = initOnServer(t, srv, strconv.Itoa(i))
			}
			s := newStage(t, operationOf("backup"))
			var said []string
			failed, unread := 0, 0
			for seed := range uint64(6) {
				// Open and read the new point, if there is one, over the same storage.
				r, err := openSmall(t.Context(), tt.open(t, location, seed+1), location)
				if err != nil {
					failed++
					wantNoDamage(t, err)
					continue
				}
				p, err := crashBackup(t.Context(), r)
				if err != nil {
					failed++
					wantNoDamage(t, err)
				} else {
					said = append(said, "point "+p.ID)
					unread += readOver(t, r, p, imageOf(p))
				}
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				s.check(t, location, said, false)
			}
			t.Logf("%d points, %d backups and %d readings failed", len(said), failed, unread)
			if len(said) == 0 || tt.fail && failed == 0 {
				t.Errorf("%d points, %d failures: nothing was shown", len(said), failed)
			}
		})
	}
}

// No backend may list less than there is. If one does, the newest point is not found to be the parent, and the packs
// are not found to be shared: the new point is whole all the same. (If it shows up before the commit, that is
// taken for another writer's, see rival.)
func TestPointsOverStaleListingsAreWhole(t *testing.T) {
	location := initAt(t)
	r, err := openOn(t.Context(), faultblob.Stale(openPlain(t, location), 1000), location, testKey()...)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	r.dataPackLen, r.nodePackLen = 32<<10, 2<<10
	image := make([]byte, 1<<20)
	for i := range 4 {
		p := noise(uint64(i), 64<<10)
		copy(image[i<<16:], p)
		var whole []write
		for off := 0; off <= i<<16; off += 64 << 10 {
			whole = append(whole, write{int64(off), image[off : off+64<<10]})
		}
		wantDisk(t, r, backup(t, r, DiskOptions{Size: 1 << 20}, whole...), image)
	}
	fresh, err := testOpen(t.Context(), location)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = fresh.Close() }()
	names, err := fresh.Points(t.Context(), "a")
	if err != nil || len(names) != 4 {
		t.Fatalf("%d points, %v", len(names), err)
	}
	for _, n := range names {
		p, err := fresh.Point(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		wantClean(t, fresh, p)
	}
}

// readOver reads every grain of a point, which may fail, and counts what did.
func readOver(t *testing.T, r *Repo, p *Point, want []byte) (failed int) {
	t.Helper()
	m, err := r.Map(p.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, crashGrain)
	for i := range m.Grains() {
		ref, err := m.Lookup(t.Context(), i)
		if err == nil {
			err = r.ReadGrain(t.Context(), ref, buf)
		}
		if err != nil {
			failed++
			wantNoDamage(t, err)
			continue
		}
		if off := i * crashGrain; string(buf) != string(want[off:off+crashGrain]) {
			t.Fatalf("grain %d is wrong", i)
		}
	}
	return failed
}

func wantNoDamage(t *testing.T, err error) {
	t.Helper()
	for _, not := range []error{ErrCorrupt, ErrNotRepository, ErrVersion, ErrNotFound, context.Canceled} {
		if errors.Is(err, not) {
			t.Errorf("storage that fails is taken for something else: %v", err)
		}
	}
	if err.Error() == "" {
		t.Error(fmt.Sprint("no message: ", err))
	}
}
