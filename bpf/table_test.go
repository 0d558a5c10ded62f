package bpf

import (
	"errors"
	"math/rand/v2"
	"testing"
)

func newTable() table { return table{&mapping{words: make([]uint64, places*placeWords)}} }

// lookup searches as the programs do.
func (t table) lookup(key uint32) []uint32 {
	var own []uint32
	for n := range uint32(probes) {
		p := t.load((firstPlace(key) + n) % places)
		if p.key == placeFree {
			break
		}
		if p.key == key {
			own = append(own, p.own)
		}
	}
	return own
}

// Whatever comes and goes, the programs find each device that is there and no other.
func TestTableFindsWhatIsThere(t *testing.T) {
	tab, there := newTable(), map[uint32]place{}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		if len(there) < maxDevices && rnd.IntN(2) == 0 {
			disk := uint32(1+rnd.IntN(300))<<20 | uint32(rnd.IntN(64))*16
			p := place{key: disk, own: disk + uint32(rnd.IntN(4)), slot: rnd.Uint32() % maxDevices, shift: 16, start: 8, sectors: 1 << 20, heatShift: 5, whole: true}
			if _, ok := there[p.own]; ok {
				continue
			}
			if err := tab.insert(p); err != nil {
				t.Fatal(err)
			}
			there[p.own] = p
		} else {
			for own := range there {
				at, p, ok := tab.find(own)
				if !ok || p != there[own] {
					t.Fatalf("find %#x: %+v, want %+v", own, p, there[own])
				}
				tab.remove(at)
				delete(there, own)
				break
			}
		}
		count := 0
		tab.all(func(uint32, place) bool { count++; return true })
		if count != len(there) {
			t.Fatalf("%d devices in the table, want %d", count, len(there))
		}
	}
	for own, p := range there {
		found := false
		for _, o := range tab.lookup(p.key) {
			found = found || o == own
		}
		if !found {
			t.Errorf("%#x is not found by the programs", own)
		}
	}
}

func TestTableIsFull(t *testing.T) {
	tab := newTable()
	for i := range uint32(probes) {
		if err := tab.insert(place{key: 7 << 20, own: 7<<20 + i}); err != nil {
			t.Fatal(err)
		}
	}
	if err := tab.insert(place{key: 7 << 20, own: 7<<20 + probes}); !errors.Is(err, ErrFull) {
		t.Errorf("got %v, want %v", err, ErrFull)
	}
}

func TestHeatRegionsCoverTheDevice(t *testing.T) {
	for _, sectors := range []uint64{1, 8, 8 * 1024, 8*1024 + 1, 1 << 21, 1 << 35, 1<<35 + 7} {
		shift := heatShift(sectors)
		if last := (sectors - 1) >> shift; last >= heatRegions || shift > 3 && (sectors-1)>>(shift-1) < heatRegions {
			t.Errorf("%d sectors: regions of 1<<%d sectors, the last is %d", sectors, shift, last)
		}
	}
}
