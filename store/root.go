package store

import "fmt"

// maxDisk is the largest disk, in bytes: 64 PiB.
const maxDisk = 1 << 56

// grains is the number of grains of a disk; the last may reach past its end.
func (r Root) grains() int64 { return (r.Size + int64(r.Grain) - 1) / int64(r.Grain) }

// levelFor returns the height of the map of a disk of so many grains.
func levelFor(grains int64) uint8 {
	level := uint8(0)
	for span := int64(fanOut); span < grains; span <<= fanOutBits {
		level++
	}
	return level
}

// span is the number of grains below a child of a node of this level.
func span(level int) int64 { return 1 << (fanOutBits * level) }

// validShape tells whether a disk can have this size and grain, in bytes.
func validShape(size int64, grain int) error {
	if grain < MinGrain || grain > MaxGrain || grain&(grain-1) != 0 {
		return fmt.Errorf("%w: grain of %d bytes: must be a power of two from %d to %d", ErrInvalid, grain, MinGrain, MaxGrain)
	}
	if size <= 0 || size > maxDisk {
		return fmt.Errorf("%w: disk of %d bytes", ErrInvalid, size)
	}
	return nil
}

func (r Root) validate() error {
	if err := validShape(r.Size, r.Grain); err != nil {
		return err
	}
	if want := levelFor(r.grains()); r.Level != want {
		return fmt.Errorf("%w: a map of level %d for a disk that needs %d", ErrInvalid, r.Level, want)
	}
	return nil
}
