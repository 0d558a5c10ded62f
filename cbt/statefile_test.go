package cbt

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

func exampleState() *savedState {
	t := time.Unix(1e9, 5).UTC()
	return &savedState{stateHeader{
		Device: "virtio a", Proof: "p", SavedAt: t, Boot: strings.Repeat("a", 32), Registration: strings.Repeat("b", 32),
		First: 2, Last: 7, Shift: 16, Size: 100<<16 + 512, Opened: t, Closed: t, Sectors: 3,
	}, []uint64{1, 1 << 36}}
}

// encoded gives b a checksum that is right.
func sealed(b []byte) []byte {
	sum := sha256.Sum256(b)
	return append(bytes.Clone(b), sum[:]...)
}

func TestStateFileIsReadBack(t *testing.T) {
	want := exampleState()
	b, err := want.encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeState(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v, %v", got, err)
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 4
		if _, err := decodeState(bad); !errors.Is(err, ErrState) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if _, err := decodeState(b[:i]); !errors.Is(err, ErrState) {
			t.Fatalf("cut after %d bytes: %v", i, err)
		}
	}
}

func FuzzDecodeState(f *testing.F) {
	b, err := exampleState().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:len(b)-sha256.Size])
	f.Add([]byte(stateMagic + "\x02\x00\x00\x00{}"))
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := decodeState(sealed(body))
		if err != nil {
			if !errors.Is(err, ErrState) {
				t.Fatal(err)
			}
			return
		}
		again, err := s.encode()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeState(again); err != nil || !reflect.DeepEqual(back, s) {
			t.Fatalf("%+v became %+v, %v", s, back, err)
		}
	})
}
