package main

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// granule is what is changed at a time, in bytes.
const granule = 64 << 10

// changes are the offsets to change in a round: percent of the disk, each granule at most once,
// at random places.
func changes(size int64, percent float64, seed uint64, round int) []int64 {
	granules := int(size / granule)
	n := max(1, int(float64(granules)*percent/100))
	p := rand.New(rand.NewPCG(seed, uint64(round))).Perm(granules)[:n]
	slices.Sort(p)
	out := make([]int64, n)
	for i, g := range p {
		out[i] = int64(g) * granule
	}
	return out
}

// change writes what can't be compressed to the device, past the page cache, and waits until it is
// there. It returns the bytes written.
func change(dev string, offsets []int64, seed uint64, round int) (n int64, err error) {
	f, err := os.OpenFile(dev, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := unix.Mmap(-1, 0, granule, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // page-aligned
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(b)) }()
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	binary.LittleEndian.PutUint64(key[8:], uint64(round))
	rnd := rand.NewChaCha8(key)
	for _, off := range offsets {
		if _, err := rnd.Read(b); err != nil {
			return n, err
		}
		if _, err := f.WriteAt(b, off); err != nil {
			return n, err
		}
		n += granule
	}
	return n, f.Sync()
}
