package guestfs

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/tidemark/tidemark/restore"
)

// ErrTable is wrapped by errors that tell of a damaged partition table.
var ErrTable = errors.New("damaged partition table")

var errOffDisk = fmt.Errorf("%w: it names partitions that are not on the disk", ErrTable)

// Partition is a piece of a disk that a partition table names.
type Partition struct {
	Number int    // as Linux counts: from 1; logical ones of an MBR from 5
	Name   string // label in a GPT; empty in an MBR
	Type   string // GUID in lower case (GPT), or "0x83" (MBR)
	Off    int64  // bytes from the start of the disk
	Len    int64  // bytes, never 0; cut to the end of the disk
}

// Partitions reads the partition table of disk: GPT, with its backup where the first is
// damaged, or MBR with logical partitions. They are in the order of the table, and may
// overlap. A disk without a table has none, with no error: a file system may lie on the
// whole of it.
//
// With an error that wraps [ErrTable], the partitions that could be made out are returned
// too. Other errors are those of reading, and of ctx.
//
// Rules are those of Linux (block/partitions/{efi,msdos}.c) but for the backup, which Linux
// uses only if told to. Sectors of 4096 bytes are known in GPTs only: an MBR does
// not say. Tables of BSD, Solaris, Apple and others are not read.
func Partitions(ctx context.Context, disk restore.Disk) ([]Partition, error) {
	if disk.Size() < 2*sector {
		return nil, nil
	}
	t := tableReader{ctx: ctx, disk: disk}
	mbr := make([]byte, sector)
	if err := t.read(mbr, 0); err != nil {
		return nil, err
	}
	if !isMBR(mbr) {
		return nil, nil
	}
	if isProtective(mbr) {
		return t.gpt()
	}
	return t.mbr(mbr)
}

// sector is the unit of MBRs, and of most GPTs, in bytes.
const sector = 512

// tableReader reads tables from a disk.
type tableReader struct {
	ctx  context.Context
	disk restore.Disk
}

// read fills p from off, which must lie on the disk.
func (t tableReader) read(p []byte, off int64) error {
	if off < 0 || off > t.disk.Size()-int64(len(p)) {
		return fmt.Errorf("%w: %d bytes at %d are not on the disk", ErrTable, len(p), off)
	}
	if err := t.ctx.Err(); err != nil {
		return err
	}
	var err error
	if r, ok := t.disk.(restore.ReaderAtContext); ok {
		_, err = r.ReadAtContext(t.ctx, p, off)
	} else {
		_, err = t.disk.ReadAt(p, off)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("partition table: %w", err)
	}
	return nil
}

// place sets where p lies, in units of unit bytes, cut to the disk's end. It returns false
// where nothing of it is on the disk.
func (t tableReader) place(p *Partition, first, count uint64, unit int64) bool {
	units := uint64(t.disk.Size()) / uint64(unit)
	if count == 0 || first >= units {
		return false
	}
	p.Off = int64(first) * unit
	p.Len = int64(min(count, units-first)) * unit
	return true
}
