package agent

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/cbt"
)

// holey are the file systems on which SEEK_HOLE sees what a read would see: both look at the page cache where
// nothing is allocated yet (ext4_llseek and xfs_file_llseek by iomap_seek_hole, shmem_file_llseek).
var holey = []int64{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.TMPFS_MAGIC}

// holes tells which whole units (a power of two, in bytes) of x are holes of an image file now: a read would see
// zeroes there. Of devices, and on other file systems, none are. It saves reading and
// proves nothing: what is written into a hole later is a change like any other.
func (d *device) holes(x cbt.Extents, unit int64) (cbt.Extents, error) {
	if !d.file {
		return nil, nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(d.f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("file system of %s: %w", d.path, err)
	}
	if !slices.Contains(holey, st.Type) {
		return nil, nil
	}
	var out cbt.Extents
	for _, e := range x {
		for at, end := e.Off, e.Off+e.Len; at < end; {
			hole, err := d.seek(at, unix.SEEK_HOLE)
			if err != nil {
				return nil, err
			}
			if hole >= end {
				break
			}
			data, err := d.seek(hole, unix.SEEK_DATA)
			if err != nil {
				return nil, err
			}
			from, to := (hole+unit-1)&^(unit-1), min(data, end)
			if to < d.size {
				to &^= unit - 1
			}
			if from < to {
				out = append(out, cbt.Extent{Off: from, Len: to - from})
			}
			at = max(data, hole+1)
		}
	}
	return out, nil
}

// seek is lseek(2); the end of the file if there is none behind off.
func (d *device) seek(off int64, whence int) (int64, error) {
	n, err := unix.Seek(int(d.f.Fd()), off, whence)
	if errors.Is(err, unix.ENXIO) {
		return d.size, nil
	}
	if err != nil {
		return 0, fmt.Errorf("holes of %s: %w", d.path, err)
	}
	return n, nil
}
