package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoIdentity is wrapped when nothing tells a device from another one at the next boot.
var ErrNoIdentity = errors.New("nothing names it for certain across boots")

// Identity is what a device is known by from one boot to the next.
type Identity struct {
	// Name says where the storage is: a serial number, a device-mapper UUID, a file.
	Name string
	// Proof differs as soon as anybody has written, on whatever system; empty if nothing
	// can tell. It is good if Settled.
	Proof string
	// Settled: a write from now on changes Proof.
	Settled bool
}

// Identity finds out by what the device can be known at the next boot. Errors wrap
// ErrNoIdentity.
func (d Device) Identity() (Identity, error) {
	if d.Partition {
		return Identity{}, fmt.Errorf("%s: %w: a partition, which can be written through its disk", d.Path, ErrNoIdentity)
	}
	id, err := identityOf(d.Name)
	if err != nil {
		return id, fmt.Errorf("%s: %w", d.Path, err)
	}
	all, err := os.ReadDir("/sys/block")
	if err != nil {
		return id, err
	}
	for _, e := range all {
		if other, err := identityOf(e.Name()); err == nil && e.Name() != d.Name && other.Name == id.Name {
			return id, fmt.Errorf("%s: %w: %s has the same name, %s", d.Path, ErrNoIdentity, e.Name(), id.Name)
		}
	}
	return id, nil
}

// identityOf looks at the whole disk with that kernel name.
func identityOf(name string) (Identity, error) {
	sys := filepath.Join("/sys/block", name)
	read := func(file string) string {
		b, err := os.ReadFile(filepath.Join(sys, file))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(strings.ToValidUTF8(string(b), "?"))
	}
	switch {
	case strings.HasPrefix(name, "loop"):
		return loopIdentity(name, read("loop/backing_file"))
	case strings.HasPrefix(name, "dm-"):
		if s := read("dm/uuid"); s != "" {
			return Identity{Name: "dm " + s}, nil
		}
	case read("wwid") != "":
		return Identity{Name: "wwid " + read("wwid")}, nil
	case read("device/wwid") != "":
		return Identity{Name: "wwid " + read("device/wwid")}, nil
	case strings.HasPrefix(name, "vd") && read("serial") != "":
		return Identity{Name: "virtio " + read("serial")}, nil
	}
	return Identity{}, ErrNoIdentity
}

// provingFS are the file systems on which it was tried that every write to a file changes its
// times, also through a loop device or a mapping. On tmpfs, a mapping's does not.
var provingFS = map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs"}

func loopIdentity(name, file string) (Identity, error) {
	if file == "" {
		return Identity{}, ErrNoIdentity
	}
	f, err := os.Open("/dev/" + name)
	if err != nil {
		return Identity{}, err
	}
	defer func() { _ = f.Close() }()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return Identity{}, fmt.Errorf("loop device: %w", err)
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, file, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return Identity{}, fmt.Errorf("%w: its file %s: %w", ErrNoIdentity, file, err)
	}
	if st.Ino != info.Inode || unix.Mkdev(st.Dev_major, st.Dev_minor) != info.Device {
		return Identity{}, fmt.Errorf("%w: its file %s is another one now", ErrNoIdentity, file)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mask&unix.STATX_BTIME == 0 {
		return Identity{}, fmt.Errorf("%w: its file %s has no time of birth", ErrNoIdentity, file)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(file, &fs); err != nil {
		return Identity{}, err
	}
	id := Identity{Name: fmt.Sprintf("file %q inode %d born %s file system %#x offset %d limit %d", file, st.Ino, stamp(st.Btime), fs.Type, info.Offset, info.Sizelimit)}
	if kind := provingFS[fs.Type]; kind != "" {
		id.Proof = fmt.Sprintf("%s file modified %s changed %s size %d", kind, stamp(st.Mtime), stamp(st.Ctime), st.Size)
		// Times advance with the kernel's tick: a write in the same one would not show.
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
			return id, err
		}
		last := max(st.Mtime.Sec*1e9+int64(st.Mtime.Nsec), st.Ctime.Sec*1e9+int64(st.Ctime.Nsec))
		id.Settled = now.Nano()-last > 1e8
	}
	return id, nil
}

func stamp(t unix.StatxTimestamp) string { return fmt.Sprintf("%d.%09d", t.Sec, t.Nsec) }
