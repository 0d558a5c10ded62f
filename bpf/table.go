package bpf

import (
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"
)

// placeWords is the size of struct device in tracker.bpf.c.
const placeWords = 5

// table is the map devices, shared with the programs by mmap. Changes need the lock of
// the tracker's directory.
type table struct{ mem *mapping }

func mapTable(m *ebpf.Map) (table, error) {
	mem, err := mapWords(m, int(m.MaxEntries())*placeWords)
	return table{mem}, err
}

// place is one entry: what is tracked, and where.
type place struct {
	key, own    uint32
	slot, shift uint32
	start       uint64 // sectors
	sectors     uint64
	heatShift   uint32
	whole       bool
}

// firstPlace is first_place of tracker.bpf.c.
func firstPlace(key uint32) uint32 { return key * 2654435761 >> 22 }

func (t table) at(i uint32) []uint64 {
	return t.mem.words[i*placeWords:][:placeWords]
}

func (t table) load(i uint32) place {
	w := t.at(i)
	id := atomic.LoadUint64(&w[0])
	return place{
		key: uint32(id), own: uint32(id >> 32), slot: uint32(w[1]), shift: uint32(w[1] >> 32),
		start: w[2], sectors: w[3], heatShift: uint32(w[4]), whole: w[4]>>32 != 0,
	}
}

// all calls f for every place in use until it says false.
func (t table) all(f func(i uint32, p place) bool) {
	for i := range uint32(places) {
		if p := t.load(i); p.key != placeFree && p.key != placeGone && !f(i, p) {
			return
		}
	}
}

// find returns the place of a device by its own number.
func (t table) find(own uint32) (uint32, place, bool) {
	var at uint32
	var found place
	ok := false
	t.all(func(i uint32, p place) bool {
		if p.own == own {
			at, found, ok = i, p, true
		}
		return !ok
	})
	return at, found, ok
}

// insert makes the programs see p. A grace period must have passed since the last
// remove: a program may still be using what stood in the place before.
func (t table) insert(p place) error {
	for n := range uint32(probes) {
		i := (firstPlace(p.key) + n) % places
		if k := t.load(i).key; k != placeFree && k != placeGone {
			continue
		}
		w := t.at(i)
		w[1] = uint64(p.slot) | uint64(p.shift)<<32
		w[2], w[3] = p.start, p.sectors
		w[4] = uint64(p.heatShift)
		if p.whole {
			w[4] |= 1 << 32
		}
		atomic.StoreUint64(&w[0], uint64(p.key)|uint64(p.own)<<32)
		return nil
	}
	return fmt.Errorf("%w: %d places of the same disk are taken", ErrFull, probes)
}

// remove makes the programs forget the device at place i. They find those behind it still.
func (t table) remove(i uint32) {
	w := t.at(i)
	if t.load((i+1)%places).key == placeFree {
		atomic.StoreUint64(&w[0], placeFree)
		return
	}
	atomic.StoreUint64(&w[0], placeGone)
}
