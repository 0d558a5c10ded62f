package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrInUse is wrapped when somebody could write to a device.
var ErrInUse = errors.New("is in use")

// Claim is a device that nobody else can mount, hold or claim until it is closed.
type Claim struct {
	f   *os.File
	dev Device
}

// Claim takes the device for itself. The error wraps ErrInUse if it is mounted, held by another
// device, or claimed by a program.
func (d Device) Claim() (*Claim, error) {
	f, err := os.OpenFile(d.Path, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%s %w: mounted, held by another device, or claimed by a program", d.Path, ErrInUse)
	}
	if err != nil {
		return nil, err
	}
	return &Claim{f, d}, nil
}

// Close gives the device back.
func (c *Claim) Close() error { return c.f.Close() }

// Sync writes out what lies in the device's page cache.
func (c *Claim) Sync() error { return c.f.Sync() }

// ReadOnly tells whether the device can't be opened for writing.
func (c *Claim) ReadOnly() (bool, error) {
	n, err := unix.IoctlGetInt(int(c.f.Fd()), unix.BLKROGET)
	return n != 0, err
}

// SetReadOnly makes writes to the device fail, or not any more. It holds until the next boot.
func (c *Claim) SetReadOnly(on bool) error { return setReadOnly(c.f, on) }

// SetReadOnly is as that of a Claim, for a device that others may use.
func (d Device) SetReadOnly(on bool) error {
	f, err := os.Open(d.Path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return setReadOnly(f, on)
}

func setReadOnly(f *os.File, on bool) error {
	n := 0
	if on {
		n = 1
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.BLKROSET, n); err != nil {
		return fmt.Errorf("%s: change whether it is read-only: %w", f.Name(), err)
	}
	return nil
}

// Writers names who has the device or a partition of it open for writing, or shares its pages
// writably, or has a loop device on it. Those who only claim it are kept out already.
func (c *Claim) Writers() ([]string, error) {
	numbers := map[uint64]bool{unix.Mkdev(c.dev.Major, c.dev.Minor): true}
	parts, err := filepath.Glob("/sys/dev/block/" + c.dev.Number() + "/*/partition")
	if err != nil {
		return nil, err
	}
	for _, p := range parts {
		n, err := deviceNumber(filepath.Dir(p))
		if err != nil {
			return nil, err
		}
		numbers[unix.Mkdev(n>>20, n&(1<<20-1))] = true
	}
	is := func(path string) bool {
		var st unix.Stat_t
		return unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && numbers[st.Rdev]
	}
	var out []string
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && is(strings.TrimSpace(string(b))) {
			out = append(out, filepath.Base(filepath.Dir(filepath.Dir(l))))
		}
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, p := range procs {
		if writes(p, is) {
			comm, _ := os.ReadFile(p + "/comm")
			out = append(out, fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), filepath.Base(p)))
		}
	}
	return out, nil
}

// writes looks at the descriptors and mappings of a process, which may end meanwhile.
func writes(proc string, is func(path string) bool) bool {
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return false
	}
	for _, fd := range fds {
		if is(proc+"/fd/"+fd.Name()) && writable(proc+"/fdinfo/"+fd.Name()) {
			return true
		}
	}
	f, err := os.Open(proc + "/maps")
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		// address, permissions, offset, device, inode, path: proc(5)
		m := strings.Fields(sc.Text())
		if len(m) > 5 && strings.HasSuffix(m[1], "s") && strings.Contains(m[1], "w") && is(proc+"/map_files/"+m[0]) {
			return true
		}
	}
	return false
}

func writable(fdinfo string) bool {
	b, err := os.ReadFile(fdinfo)
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), "flags:")
	flags, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.ParseUint(strings.TrimSpace(flags), 8, 64)
	return err != nil || n&unix.O_ACCMODE != unix.O_RDONLY
}
