package store

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/faultblob"
)

// noLocks hides the locks of a backend, as S3 has none.
type noLocks struct{ blob.Store }

func withoutLocks(t *testing.T, h faultblob.Handler) *Repo {
	t.Helper()
	location := initAt(t)
	r, err := openOn(t.Context(), faultblob.New(h).Over(noLocks{openPlain(t, location)}), location, testKey()...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func beginWith(t *testing.T, r *Repo, w write) *Writer {
	t.Helper()
	b, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Abort() })
	d, err := b.Disk(t.Context(), DiskOptions{Name: "disk0", Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), w.off, w.p); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSecondWriterWithoutLocks(t *testing.T) {
	r := withoutLocks(t, nil)
	a, b := beginWith(t, r, write{0, noise(1, 64<<10)}), beginWith(t, r, write{0, noise(2, 64<<10)})
	first, err := a.Commit(t.Context(), testPoint("disk0"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Commit(t.Context(), testPoint("disk0")); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), first.ID) {
		t.Errorf("second writer: %v", err)
	}
	if names, err := r.Points(t.Context(), "a"); err != nil || len(names) != 1 {
		t.Errorf("points: %v, %v", names, err)
	}
}

// Both have looked before either publishes: two points, both whole.
func TestWritersThatPublishAtOnce(t *testing.T) {
	var both sync.WaitGroup
	both.Add(2)
	r := withoutLocks(t, func(ctx context.Context, e faultblob.Event) error {
		if e.Op == faultblob.Put && e.When == faultblob.Before && strings.HasPrefix(e.Name, "points/") {
			both.Done()
			met := make(chan struct{})
			go func() { both.Wait(); close(met) }()
			select {
			case <-met:
			case <-ctx.Done():
			case <-time.After(10 * time.Second):
				return errors.New("the other writer did not come so far")
			}
		}
		return nil
	})
	contents := [][]byte{noise(1, 1<<20), noise(2, 1<<20)}
	points := make([]*Point, 2)
	errs := make([]error, 2)
	writers := []*Writer{beginWith(t, r, write{0, contents[0]}), beginWith(t, r, write{0, contents[1]})}
	var done sync.WaitGroup
	for i, w := range writers {
		done.Go(func() { points[i], errs[i] = w.Commit(t.Context(), testPoint("disk0")) })
	}
	done.Wait()
	for i, p := range points {
		if errs[i] != nil {
			t.Fatal(errs[i])
		}
		wantClean(t, r, p)
		wantDisk(t, r, p, contents[i])
	}
	// The next one goes on from the newer.
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	newer := points[0]
	if c := points[1].Time.Compare(newer.Time); c > 0 || c == 0 && points[1].ID > newer.ID { // the order of their names
		newer = points[1]
	}
	if w.Parent().ID != newer.ID {
		t.Errorf("parent %s, want %s", w.Parent().ID, newer.ID)
	}
}
