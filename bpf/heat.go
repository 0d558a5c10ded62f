package bpf

import "slices"

// Heat is where on a device was written, since it was registered.
type Heat struct {
	Region int64    // bytes per region, a power of two
	Bytes  []uint64 // written to each region; processors may overwrite each other's additions, so a little less than the truth
}

// heatShift is the least that lets all sectors fall into heatRegions regions of at
// least 4 KiB.
func heatShift(sectors uint64) uint32 {
	shift := uint32(3)
	for sectors > heatRegions<<shift {
		shift++
	}
	return shift
}

func (t *Tracker) heatWords(slot uint32) []uint64 {
	return t.heatMap.words[int(slot)*heatRegions:][:heatRegions]
}

func (t *Tracker) heat(slot, shift uint32, sectors uint64) Heat {
	regions := (sectors + 1<<shift - 1) >> shift
	return Heat{Region: 512 << shift, Bytes: slices.Clone(t.heatWords(slot)[:regions])}
}
