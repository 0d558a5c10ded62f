package guestfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"unicode/utf16"
)

// GPT: UEFI specification 2.10, 5.3. Bytes of a header and of an entry.
const (
	gptSignature  = "EFI PART"
	gptHeaderSize = 92
	gptEntrySize  = 128

	// gptTable is how large an array of entries may be, in bytes: Linux takes no
	// larger one.
	gptTable = 4 << 20
)

// gpt reads the first table that is whole.
func (t tableReader) gpt() ([]Partition, error) {
	var failed error
	for _, unit := range []int64{sector, 4096} {
		for _, lba := range []int64{1, t.disk.Size()/unit - 1} {
			parts, err := t.gptAt(lba, unit)
			if err == nil || errors.Is(err, errOffDisk) {
				return parts, err
			}
			if !errors.Is(err, ErrTable) {
				return nil, err
			}
			if failed == nil || errors.Is(failed, errNoGPT) {
				failed = err
			}
		}
	}
	return nil, failed
}

var errNoGPT = fmt.Errorf("%w: no GPT where the MBR says that there is one", ErrTable)

// gptAt reads the table whose header is at lba, in units of unit bytes.
func (t tableReader) gptAt(lba, unit int64) ([]Partition, error) {
	if lba < 1 || lba >= t.disk.Size()/unit {
		return nil, errNoGPT
	}
	h := make([]byte, unit)
	if err := t.read(h, lba*unit); err != nil {
		return nil, err
	}
	if string(h[:8]) != gptSignature {
		return nil, errNoGPT
	}
	le := binary.LittleEndian
	size := le.Uint32(h[12:])
	if size < gptHeaderSize || int64(size) > unit {
		return nil, fmt.Errorf("%w: GPT header of %d bytes", ErrTable, size)
	}
	sum := le.Uint32(h[16:])
	clear(h[16:20])
	if crc32.ChecksumIEEE(h[:size]) != sum {
		return nil, fmt.Errorf("%w: GPT header's checksum", ErrTable)
	}
	if my := le.Uint64(h[24:]); my != uint64(lba) {
		return nil, fmt.Errorf("%w: GPT header of sector %d in sector %d", ErrTable, my, lba)
	}
	at, count, entry := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if entry < gptEntrySize || entry > 4096 || uint64(count)*uint64(entry) > gptTable {
		return nil, fmt.Errorf("%w: GPT of %d entries of %d bytes", ErrTable, count, entry)
	}
	if at >= uint64(t.disk.Size()/unit) {
		return nil, fmt.Errorf("%w: GPT entries at sector %d", ErrTable, at)
	}
	table := make([]byte, int(count)*int(entry))
	if err := t.read(table, int64(at)*unit); err != nil {
		return nil, err
	}
	if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
		return nil, fmt.Errorf("%w: GPT entries' checksum", ErrTable)
	}
	return t.gptEntries(table, int(entry), unit)
}

func (t tableReader) gptEntries(table []byte, size int, unit int64) (parts []Partition, err error) {
	for i := 0; i*size < len(table); i++ {
		e := table[i*size:][:gptEntrySize]
		kind := guid(e)
		if kind == unusedGUID {
			continue
		}
		p := Partition{Number: i + 1, Type: kind, Name: gptName(e[56:128])}
		first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
		if first > last || last+1 == 0 || !t.place(&p, first, last-first+1, unit) {
			err = errOffDisk
			continue
		}
		parts = append(parts, p)
	}
	return parts, err
}

const unusedGUID = "00000000-0000-0000-0000-000000000000"

// guid prints the GUID that p begins with: its first three fields are little-endian.
func guid(p []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(p), le.Uint16(p[4:]), le.Uint16(p[6:]), p[8:10], p[10:16])
}

// gptName decodes UTF-16 up to the first NUL.
func gptName(p []byte) string {
	var units []uint16
	for ; len(p) > 1; p = p[2:] {
		u := binary.LittleEndian.Uint16(p)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return strings.TrimSpace(string(utf16.Decode(units)))
}
