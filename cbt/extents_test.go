package cbt

import (
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestBitmapExtentsAreTheSetBits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		words := rapid.SliceOfN(rapid.OneOf(rapid.Just(uint64(0)), rapid.Just(^uint64(0)), rapid.Uint64()), 1, 8).Draw(t, "words")
		size := int64(len(words))*64<<12 - rapid.Int64Range(0, 4095).Draw(t, "short")
		want := make([]bool, len(words)*64)
		for i := range want {
			want[i] = words[i/64]>>(i%64)&1 == 1
		}
		got := make([]bool, len(want))
		end := int64(-1)
		for _, e := range (Bitmap{Words: words, Shift: 12, Size: size}).Extents() {
			if e.Len <= 0 || e.Off <= end || e.Off+e.Len > size {
				t.Fatalf("extent %+v after %d, size %d", e, end, size)
			}
			end = e.Off + e.Len
			for g := e.Off >> 12; g<<12 < end; g++ {
				got[g] = true
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("words %x", words)
		}
	})
}

func TestAlignCoversAndMerges(t *testing.T) {
	got := Extents{{5, 1}, {4096, 1}, {9000, 10}, {20000, 1}}.Align(4096, 20100)
	want := Extents{{0, 12288}, {16384, 20100 - 16384}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func FuzzParseChangeID(f *testing.F) {
	f.Add("")
	f.Add("0123456789abcdef0123456789abcdef.7")
	f.Add("0123456789abcdef0123456789abcdef.07")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseChangeID(s)
		if err != nil {
			if !errors.Is(err, ErrChangeID) {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if id.String() != s {
			t.Errorf("%q became %q", s, id)
		}
	})
}

func BenchmarkExtentsOneTiB(b *testing.B) {
	bm := Bitmap{Words: make([]uint64, 1<<40>>16/64), Shift: 16, Size: 1 << 40}
	for i := 0; i < len(bm.Words); i += 100 {
		bm.Words[i] = 0xff
	}
	for b.Loop() {
		bm.Extents()
	}
}
