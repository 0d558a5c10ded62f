package bpf

import (
	"encoding/binary"
	"testing"
)

func dmTarget(next uint32, start uint64, params string) []byte {
	b := make([]byte, dmTargetSpec, dmTargetSpec+len(params)+1)
	binary.LittleEndian.PutUint64(b, start)
	binary.LittleEndian.PutUint32(b[20:], next)
	copy(b[24:], "linear")
	return append(append(b, params...), 0)
}

func TestHashTargets(t *testing.T) {
	hash := func(b []byte, n uint32) uint64 {
		t.Helper()
		h, err := hashTargets(b, n)
		if err != nil || h == 0 {
			t.Fatal(h, err)
		}
		return h
	}
	one := dmTarget(0, 0, "7:0 0")
	if hash(one, 1) != hash(append(one, 1, 2, 3), 1) {
		t.Error("what lies behind the table counts")
	}
	if hash(one, 1) == hash(dmTarget(0, 0, "7:0 8"), 1) {
		t.Error("another offset is the same table")
	}
	two := append(dmTarget(uint32(len(one)), 0, "7:0 0"), dmTarget(0, 8, "7:1 0")...)
	if hash(two, 2) == hash(two, 1) {
		t.Error("the second target doesn't count")
	}
	for _, cut := range []int{0, 10, dmTargetSpec, len(one) - 1} {
		if _, err := hashTargets(one[:cut], 1); err == nil {
			t.Errorf("cut after %d bytes: no error", cut)
		}
	}
}

func FuzzHashTargets(f *testing.F) {
	f.Add(dmTarget(0, 0, "7:0 0"), uint32(1))
	f.Add(dmTarget(0xffffffff, 0, "7:0 0"), uint32(2))
	f.Add(dmTarget(0, 0, "loops"), uint32(1<<31))
	f.Fuzz(func(_ *testing.T, b []byte, n uint32) { _, _ = hashTargets(b, n%4096) })
}
