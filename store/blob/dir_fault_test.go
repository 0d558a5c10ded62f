package blob_test

import (
	"bytes"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/blobtest"
	"github.com/tidemark/tidemark/store/blob/faultblob"
)

func TestDirConformsBelowFaultLayer(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store {
		l, d := faultblob.New(nil), newDir(t)
		l.Watch(d)
		return l.Over(d)
	})
}

func TestDirConformsOutOfOrder(t *testing.T) {
	var seed atomic.Uint64
	blobtest.Run(t, func(t *testing.T) blob.Store {
		l, d := faultblob.New(faultblob.Delays(seed.Add(1), 3*time.Millisecond)), newDir(t)
		l.Watch(d)
		return l.Over(d)
	})
}

// Operations that fail before, amid and after their work, and happen twice.
func TestDirBelowFaults(t *testing.T) {
	blobtest.Faults(t, 20, func(t *testing.T, seed uint64) (blob.Store, func()) {
		var calm atomic.Bool
		l := faultblob.New(faultblob.Until(&calm, faultblob.Random(seed, 8)))
		return l.Over(newDir(t)), func() { calm.Store(true) }
	})
}

// System calls that fail.
func TestDirOnFailingDisk(t *testing.T) {
	for _, named := range []bool{false, true} {
		blobtest.Faults(t, 20, func(t *testing.T, seed uint64) (blob.Store, func()) {
			var calm atomic.Bool
			l, d := faultblob.New(faultblob.Until(&calm, faultblob.Random(seed, 12))), newDir(t)
			if named {
				blob.UseNamedTempFiles(d)
			}
			l.Watch(d)
			return d, func() { calm.Store(true) }
		})
	}
}

// Each step of a Put fails once: what failed is not there, and the name is free.
func TestDirPutFailsAtEachStep(t *testing.T) {
	for _, named := range []bool{false, true} {
		steps := int64(1)
		var seen []string
		for at := int64(1); at <= steps; at++ {
			d, l := newDir(t), faultblob.New(faultblob.FailAt(at))
			if named {
				blob.UseNamedTempFiles(d)
			}
			if at == 1 {
				l = faultblob.New(nil)
				l.Log(func(e faultblob.Event) { seen = append(seen, string(e.Op)) })
				l.Watch(d)
				if err := d.Put(t.Context(), "x/a", bytes.NewReader([]byte("1")), 1); err != nil {
					t.Fatal(err)
				}
				steps = l.Count()
				d, l = newDir(t), faultblob.New(faultblob.FailAt(at))
				if named {
					blob.UseNamedTempFiles(d)
				}
			}
			l.Watch(d)
			if err := d.Put(t.Context(), "x/a", bytes.NewReader([]byte("1")), 1); !errors.Is(err, faultblob.ErrInjected) {
				t.Fatalf("step %d (%s) failed; Put: %v", at, seen[at-1], err)
			}
			if _, err := d.Stat(t.Context(), "x/a"); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("step %d (%s) failed; Stat: %v", at, seen[at-1], err)
			}
			if err := d.Put(t.Context(), "x/a", bytes.NewReader([]byte("2")), 1); err != nil {
				t.Errorf("step %d (%s) failed; Put afterwards: %v", at, seen[at-1], err)
			}
		}
		// What a durable Put takes, in its order: else a crash shows it half.
		want := "mkdir syncdir create write sync link syncdir"
		if got := strings.ReplaceAll(strings.Join(seen, " "), "step:", ""); got != want {
			t.Errorf("named=%v: steps %q, want %q", named, got, want)
		}
	}
}
