package restore

import (
	"errors"
	"math/rand/v2"
	"testing"
)

// TestLiveKnowsWhatWasRead holds the bookkeeping of a Live disk against a slice of booleans.
func TestLiveKnowsWhatWasRead(t *testing.T) {
	const size = 1000
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		d := &Live{size: size}
		var spans []Span
		unread := make([]bool, size)
		for at := rnd.Int64N(20); at < size; at += 1 + rnd.Int64N(30) {
			n := min(1+rnd.Int64N(50), size-at)
			spans = append(spans, Span{at, n})
			for i := at; i < at+n; i++ {
				unread[i] = true
			}
			at += n
		}
		d.SetChanged(spans)
		changed := append([]bool(nil), unread...)
		if got := d.Changed(); got != count(changed) {
			t.Fatalf("%d changed, want %d", got, count(changed))
		}
		for range 30 {
			off := rnd.Int64N(size)
			n := min(rnd.Int64N(120), size-off)
			d.noteRead(off, n)
			for i := off; i < off+n; i++ {
				unread[i] = false
			}
			if got := d.Unread(); got != count(unread) {
				t.Fatalf("after a read of %d+%d: %d unread, want %d", off, n, got, count(unread))
			}
			got := make([]bool, size)
			for c, err := range d.Diff(t.Context(), d.Base(), off, n) {
				if err != nil {
					t.Fatal(err)
				}
				for i := c.Off; i < c.Off+c.Len; i++ {
					got[i] = true
				}
			}
			for i := range got {
				if in := int64(i) >= off && int64(i) < off+n; got[i] != (in && changed[i]) {
					t.Fatalf("difference of %d+%d: byte %d is %v", off, n, i, got[i])
				}
			}
		}
	}
}

func count(bits []bool) (n int64) {
	for _, b := range bits {
		if b {
			n++
		}
	}
	return n
}

func TestLiveComparesWithItsOwnPastOnly(t *testing.T) {
	d := &Live{size: 10}
	for _, err := range (&Live{size: 10}).Diff(t.Context(), d.Base(), 0, 10) {
		if !errors.Is(err, ErrIncomparable) {
			t.Errorf("%v", err)
		}
	}
	if _, err := d.Base().ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("a state that was not kept can be read")
	}
	if _, err := OpenLive("/dev/null"); err == nil {
		t.Error("/dev/null is a disk")
	}
	if _, err := OpenLive(t.TempDir()); err == nil {
		t.Error("a directory is a disk")
	}
}
