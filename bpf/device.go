package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Device is a block device as the kernel sees it now: a disk, or a partition of one.
type Device struct {
	Path    string // as given
	Name    string // kernel name, such as "loop0"
	Major   uint32
	Minor   uint32
	Size    int64  // bytes
	DiskSeq uint64 // of the disk; 0 where the kernel has none (before 5.15)
	// BioBased tells that writes complete as bios and not as requests.
	BioBased bool
	// Table is a hash of the device-mapper table, 0 for other devices.
	Table uint64
	// Partition tells that it is one. It begins Start bytes into its disk.
	Partition bool
	Start     int64

	disk uint32 // number of the whole disk
}

// key is how the programs name its disk: MKDEV of include/linux/kdev_t.h.
func (d Device) key() uint32 { return d.disk }

// own is its own number in the same form.
func (d Device) own() uint32 { return d.Major<<20 | d.Minor }

// Number is the device number as lsblk prints it.
func (d Device) Number() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// Lookup describes the block device at path. Errors wrap ErrNotBlock,
// ErrUntrackable or fs.ErrNotExist.
func Lookup(path string) (Device, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Device{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return Device{}, fmt.Errorf("%s: %w", path, ErrNotBlock)
	}
	return describe(Device{Path: path, Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev)})
}

// again describes the device that has d's path now, or its number if it has no path.
func (d Device) again() (Device, error) {
	if d.Path != "" {
		return Lookup(d.Path)
	}
	return describe(Device{Major: d.Major, Minor: d.Minor})
}

// describe fills in all but path and number.
func describe(d Device) (Device, error) {
	path := d.Path
	if path == "" {
		path = "device " + d.Number()
	}
	sys, err := filepath.EvalSymlinks("/sys/dev/block/" + d.Number())
	if err != nil {
		return Device{}, fmt.Errorf("%s: %w", path, err)
	}
	d.Name = filepath.Base(sys)
	sectors, err := readUint(filepath.Join(sys, "size"))
	if err != nil {
		return Device{}, fmt.Errorf("%s: %w", path, err)
	}
	d.Size = int64(sectors) * 512
	d.disk = d.own()
	if _, err := os.Stat(filepath.Join(sys, "partition")); err == nil {
		d.Partition = true
		start, err := readUint(filepath.Join(sys, "start"))
		if err != nil {
			return Device{}, fmt.Errorf("%s: %w", path, err)
		}
		d.Start = int64(start) * 512
		sys = filepath.Dir(sys)
		if d.disk, err = deviceNumber(sys); err != nil {
			return Device{}, fmt.Errorf("%s: %w", path, err)
		}
	}
	disk := filepath.Base(sys)
	d.DiskSeq, err = readUint(filepath.Join(sys, "diskseq"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Device{}, fmt.Errorf("%s: %w", path, err)
	}
	_, err = os.Stat(filepath.Join(sys, "mq"))
	d.BioBased = err != nil
	why := invisible(sys, disk)
	if why == "" && d.BioBased {
		why = passesOn(sys, disk)
	}
	if why != "" {
		return Device{}, fmt.Errorf("%s: %w: %s", path, ErrUntrackable, why)
	}
	if strings.HasPrefix(disk, "dm-") {
		if d.Table, err = dmTableHash(d.disk>>20, d.disk&(1<<20-1)); err != nil {
			return Device{}, fmt.Errorf("%s: %w: %w", path, ErrUntrackable, err)
		}
	}
	return d, nil
}

// deviceNumber reads the number of the device that sys describes.
func deviceNumber(sys string) (uint32, error) {
	b, err := os.ReadFile(filepath.Join(sys, "dev"))
	if err != nil {
		return 0, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("%s/dev: %w", sys, err)
	}
	return major<<20 | minor, nil
}

// invisible says why writes to the device bypass the tracepoints, or nothing.
func invisible(sys, name string) string {
	if dax, err := readUint(filepath.Join(sys, "queue/dax")); err == nil && dax == 1 {
		return "it supports DAX, which writes without the block layer"
	}
	// These drivers had an rw_page operation, removed in 6.3, which writes pages
	// without a bio.
	for _, driver := range []string{"ram", "zram", "pmem", "btt"} {
		if rest, ok := strings.CutPrefix(name, driver); ok && strings.TrimLeft(rest, "0123456789.s") == "" && kernelBefore(6, 4) {
			return "on this kernel its driver writes pages without a bio (rw_page)"
		}
	}
	return ""
}

// passesOn says why completions of a bio-based device may not be seen, or nothing.
// A driver that hands the same bio to another device (NVMe multipath, md linear and
// raid0, a detached bcache) lets it complete as a request of that one:
// blk_update_request then clears BIO_TRACE_COMPLETION and block_bio_complete
// never fires. So only drivers that are known to end their own bios are let in.
func passesOn(sys, name string) string {
	switch {
	case strings.HasPrefix(name, "dm-"), strings.HasPrefix(name, "zram"), strings.HasPrefix(name, "ram"):
	case strings.HasPrefix(name, "md"):
		level, err := os.ReadFile(filepath.Join(sys, "md/level"))
		if err != nil {
			return "the level of the array is not known"
		}
		switch l := strings.TrimSpace(string(level)); l {
		case "raid1", "raid4", "raid5", "raid6", "raid10":
		default:
			return "md " + l + " passes writes on to its members, where their completion can't be attributed to it"
		}
	case strings.HasPrefix(name, "nvme"):
		return "NVMe multipath passes writes on to a path, where their completion can't be attributed to it (nvme_core.multipath=N turns it off)"
	default:
		return "its driver completes bios in a way that is not known"
	}
	// An array above would pass bios down that were announced above already.
	holders, err := os.ReadDir(filepath.Join(sys, "holders"))
	if err != nil {
		return ""
	}
	for _, h := range holders {
		if !strings.HasPrefix(h.Name(), "dm-") {
			return h.Name() + " is built on it: track that"
		}
	}
	return ""
}

func kernelBefore(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return true
	}
	var a, b int
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); n != 2 {
		return true
	}
	return a < major || a == major && b < minor
}

func readUint(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

// bootID tells one boot of this host from another.
func bootID() ([16]byte, error) {
	var id [16]byte
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id, err
	}
	s := strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")
	for i := range id {
		if len(s) < 2*i+2 {
			return id, fmt.Errorf("boot_id: %q", b)
		}
		v, err := strconv.ParseUint(s[2*i:2*i+2], 16, 8)
		if err != nil {
			return id, fmt.Errorf("boot_id: %w", err)
		}
		id[i] = byte(v)
	}
	return id, nil
}

// Disks are the whole disks of this host that can be tracked.
func Disks() ([]Device, error) {
	all, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, err
	}
	var out []Device
	for _, e := range all {
		// A "!" stands for the "/" of a name (cciss).
		d, err := Lookup("/dev/" + strings.ReplaceAll(e.Name(), "!", "/"))
		if err == nil && d.Size > 0 {
			out = append(out, d)
		}
	}
	return out, nil
}
