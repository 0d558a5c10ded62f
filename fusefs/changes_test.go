package fusefs

import (
	"encoding/json"
	"errors"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/tidemark/tidemark/restore"
)

func sequence(changes []restore.Change, err error) iter.Seq2[restore.Change, error] {
	return func(yield func(restore.Change, error) bool) {
		for _, c := range changes {
			if !yield(c, nil) {
				return
			}
		}
		if err != nil {
			yield(restore.Change{}, err)
		}
	}
}

func TestCollectChanges(t *testing.T) {
	got, merged, err := collectChanges(sequence([]restore.Change{{Off: 0, Len: 10}, {Off: 10, Len: 5}, {Off: 15, Len: 5, Zero: true}, {Off: 30, Len: 1, Zero: true}}, nil), 10)
	want := []changeExtent{{0, 15, false}, {15, 5, true}, {30, 1, true}}
	if err != nil || merged || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, %v, want %v", got, merged, err, want)
	}
	if got, _, err := collectChanges(sequence(nil, nil), 10); err != nil || got == nil || len(got) != 0 {
		t.Errorf("of nothing: %v, %v; want an empty list, which is [] in JSON", got, err)
	}
	if _, _, err := collectChanges(sequence(nil, errors.ErrUnsupported), 10); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("the error is lost: %v", err)
	}
}

// Whatever is joined, all changes are covered, and zeroes are zeroes.
func TestManyChangesAreJoined(t *testing.T) {
	const size, block = 4000, 4096
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		kinds := make([]int, size) // 0 same, 1 data, 2 zero
		var changes []restore.Change
		for i := range kinds {
			if kinds[i] = max(0, rnd.IntN(3+int(seed%10)*3)-int(seed%10)*3); kinds[i] > 0 {
				changes = append(changes, restore.Change{Off: int64(i) * block, Len: block, Zero: kinds[i] == 2})
			}
		}
		limit := 2 + rnd.IntN(60)
		got, merged, err := collectChanges(sequence(changes, nil), limit)
		if err != nil || len(got) > limit || !merged && len(changes) > 2*limit*size {
			t.Fatalf("%d extents, limit %d, %v", len(got), limit, err)
		}
		covered := make([]bool, size)
		end := int64(-1)
		for _, e := range got {
			if e.Offset <= end && end > 0 && e.Offset < end {
				t.Fatalf("extents overlap: %v", got)
			}
			end = e.Offset + e.Length
			for b := e.Offset / block; b < end/block; b++ {
				covered[b] = true
				if e.Zero && kinds[b] != 2 {
					t.Fatalf("seed %d: block %d is said to be zeroes", seed, b)
				}
			}
		}
		for b, k := range kinds {
			if k > 0 && !covered[b] {
				t.Fatalf("seed %d: change of block %d is lost", seed, b)
			}
		}
		if _, err := json.Marshal(got); err != nil {
			t.Fatal(err)
		}
	}
}
