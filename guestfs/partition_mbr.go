package guestfs

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The four entries of an MBR and of the sectors of its extended partition.
const (
	mbrEntries   = 446
	mbrEntrySize = 16
	mbrSignature = "\x55\xaa" // at 510

	mbrProtective = 0xee

	maxLogical = 256 // sectors in a chain of logical partitions
)

type mbrEntry struct {
	kind         byte
	first, count uint64 // sectors
}

func mbrEntryAt(p []byte, i int) mbrEntry {
	e := p[mbrEntries+i*mbrEntrySize:][:mbrEntrySize]
	return mbrEntry{
		kind:  e[4],
		first: uint64(binary.LittleEndian.Uint32(e[8:])),
		count: uint64(binary.LittleEndian.Uint32(e[12:])),
	}
}

func (e mbrEntry) name() string { return fmt.Sprintf("0x%02x", e.kind) }

// extended tells whether e holds logical partitions: DOS, Windows 95, Linux.
func (e mbrEntry) extended() bool {
	return e.count > 0 && (e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85)
}

// isMBR tells an MBR from the first sector of a file system, which may carry the same
// signature: in there code or text lies where flags should be.
func isMBR(p []byte) bool {
	if string(p[510:]) != mbrSignature {
		return false
	}
	for i := range 4 {
		if flag := p[mbrEntries+i*mbrEntrySize]; flag != 0 && flag != 0x80 {
			return false
		}
	}
	return true
}

// isProtective tells whether the disk has a GPT.
func isProtective(p []byte) bool {
	for i := range 4 {
		if e := mbrEntryAt(p, i); e.kind == mbrProtective && e.first == 1 {
			return true
		}
	}
	return false
}

// mbr reads the table of the first sector.
func (t tableReader) mbr(p []byte) (parts []Partition, err error) {
	next := 5
	for i := range 4 {
		e := mbrEntryAt(p, i)
		switch {
		case e.count == 0:
			continue
		case e.extended():
			logical, after, lerr := t.logical(e, next)
			if lerr != nil && !errors.Is(lerr, ErrTable) {
				return nil, lerr
			}
			next = after
			parts, err = append(parts, logical...), errors.Join(err, lerr)
			continue
		}
		part := Partition{Number: i + 1, Type: e.name()}
		if !t.place(&part, e.first, e.count, sector) {
			err = errors.Join(err, errOffDisk)
			continue
		}
		parts = append(parts, part)
	}
	return parts, err
}

// logical follows the chain of an extended partition, whose partitions have the numbers
// [number, next). Partitions count from the sector that names them, links from the start of the
// extended partition.
func (t tableReader) logical(ext mbrEntry, number int) (parts []Partition, next int, err error) {
	seen := map[uint64]bool{}
	for at, size := ext.first, ext.count; size > 0; {
		if seen[at] || len(seen) == maxLogical {
			return parts, number, errors.Join(err, fmt.Errorf("%w: logical partitions without an end", ErrTable))
		}
		seen[at] = true
		p := make([]byte, sector)
		if err := t.read(p, int64(at)*sector); err != nil {
			return parts, number, err
		}
		if string(p[510:]) != mbrSignature {
			return parts, number, errors.Join(err, fmt.Errorf("%w: no logical partition at sector %d, though one is named", ErrTable, at))
		}
		var link mbrEntry
		for i := range 4 {
			e := mbrEntryAt(p, i)
			if e.extended() && link.count == 0 {
				link = e
			}
			if e.count == 0 || e.extended() {
				continue
			}
			// The last two hold rubbish at times.
			if first := at + e.first; i >= 2 && (e.first+e.count > size || first < ext.first || first+e.count > ext.first+ext.count) {
				continue
			}
			part := Partition{Number: number, Type: e.name()}
			number++
			if t.place(&part, at+e.first, e.count, sector) {
				parts = append(parts, part)
			} else {
				err = errors.Join(err, errOffDisk)
			}
		}
		at, size = ext.first+link.first, link.count
	}
	return parts, number, err
}
