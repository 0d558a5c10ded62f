package agent

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/internal/procfs"
)

// user is a process that has disks open for writing.
type user struct {
	pid   int
	comm  string
	args  []string
	disks []bool // which of those that were asked for
}

// choose finds out who of the users can be paused, and how. No Pauser means that
// the instant has to be found quiet; the text says why.
func choose(disks []*device, users []user) (Pauser, string, error) {
	var mounts []string
	for _, d := range disks {
		ms, err := mountsOf(d.path)
		if err != nil {
			return nil, "", err
		}
		mounts = append(mounts, ms...)
	}
	var names []string
	for _, u := range users {
		if s := u.path(qmpSocket(u.args)); s != "" {
			return &qmpPauser{socket: s}, fmt.Sprintf("qmp=%s (%s, pid %d, has the disk open)", s, u.comm, u.pid), nil
		}
		names = append(names, fmt.Sprintf("%s (pid %d)", u.comm, u.pid))
	}
	switch {
	case len(users) > 0:
		return nil, "none: no way is known to pause " + strings.Join(names, ", "), nil
	case len(mounts) == 1 && len(disks) == 1:
		return &freezePauser{dir: mounts[0], disks: paths(disks)}, fmt.Sprintf("freeze=%s (mounted there on this host)", mounts[0]), nil
	case len(mounts) > 0:
		return nil, "none: mounted on this host at " + strings.Join(mounts, ", "), nil
	}
	return nil, "none: nobody has the disk open", nil
}

// path is where this process finds what u calls name: u may have another working
// directory or root.
func (u user) path(name string) string {
	if name == "" {
		return ""
	}
	proc := fmt.Sprintf("/proc/%d", u.pid)
	if !filepath.IsAbs(name) {
		cwd, err := os.Readlink(proc + "/cwd")
		if err != nil {
			return ""
		}
		name = filepath.Join(cwd, name)
	}
	if root, err := os.Readlink(proc + "/root"); err == nil && root != "/" {
		return filepath.Join(proc, "root", name)
	}
	return name
}

// usersOf finds the processes, but this one, that have one of the disks open for writing, by
// process ID. Hosts have many processes: it looks at each once, for all disks.
func usersOf(ctx context.Context, disks []*device) ([]user, error) {
	want := make([]unix.Stat_t, len(disks))
	for i, d := range disks {
		if err := unix.Stat(d.path, &want[i]); err != nil {
			return nil, &os.PathError{Op: "stat", Path: d.path, Err: err}
		}
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []user
	self := os.Getpid()
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == self {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if open := hasOpen(pid, want); slices.Contains(open, true) {
			u := user{pid: pid, comm: commOf(pid), disks: open}
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			for arg := range bytes.SplitSeq(bytes.TrimRight(b, "\x00"), []byte{0}) {
				u.args = append(u.args, string(arg))
			}
			out = append(out, u)
		}
	}
	slices.SortFunc(out, func(a, b user) int { return cmp.Compare(a.pid, b.pid) })
	return out, nil
}

func commOf(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSpace(string(b))
}

// hasOpen looks through the descriptors of a process, which may end meanwhile, for each of the
// files wanted.
func hasOpen(pid int, want []unix.Stat_t) []bool {
	proc := fmt.Sprintf("/proc/%d", pid)
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return nil
	}
	open := make([]bool, len(want))
	for _, fd := range fds {
		st, err := cachedStat(proc + "/fd/" + fd.Name())
		if err != nil {
			continue
		}
		for i := range want {
			open[i] = open[i] || sameFile(&st, &want[i]) && opensForWriting(proc+"/fdinfo/"+fd.Name())
		}
	}
	return open
}

// cachedStat is stat, but does not ask a server (NFS, FUSE): one that hangs would hang
// whoever looks at what others have open. Filled are Mode, Ino, Dev and Rdev, which such a
// file never changes.
func cachedStat(path string) (st unix.Stat_t, err error) {
	var x unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE|unix.STATX_INO, &x); err != nil {
		return st, err
	}
	st.Mode, st.Ino = uint32(x.Mode), x.Ino
	st.Dev, st.Rdev = unix.Mkdev(x.Dev_major, x.Dev_minor), unix.Mkdev(x.Rdev_major, x.Rdev_minor)
	return st, nil
}

// sameFile compares block devices by their number, all else by its inode.
func sameFile(a, b *unix.Stat_t) bool {
	switch {
	case a.Mode&unix.S_IFMT != b.Mode&unix.S_IFMT:
		return false
	case a.Mode&unix.S_IFMT == unix.S_IFBLK:
		return a.Rdev == b.Rdev
	}
	return a.Dev == b.Dev && a.Ino == b.Ino
}

func opensForWriting(fdinfo string) bool {
	b, err := os.ReadFile(fdinfo)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "flags:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 8, 64)
			return err == nil && n&unix.O_ACCMODE != unix.O_RDONLY
		}
	}
	return false
}

// qmpSocket finds a control monitor on a unix socket in QEMU's command line.
func qmpSocket(args []string) string {
	chardevs := map[string]string{}
	for i := 0; i+1 < len(args); i++ {
		if args[i] == "-chardev" {
			o := options(args[i+1])
			if o["path"] != "" {
				chardevs[o["id"]] = o["path"]
			}
		}
	}
	for i := 0; i+1 < len(args); i++ {
		switch args[i] {
		case "-qmp", "-qmp-pretty":
			if rest, ok := strings.CutPrefix(args[i+1], "unix:"); ok {
				path, _, _ := strings.Cut(rest, ",")
				return path
			}
		case "-mon":
			if o := options(args[i+1]); o["mode"] == "control" {
				if p := chardevs[o["chardev"]]; p != "" {
					return p
				}
			}
		}
	}
	return ""
}

// options splits QEMU's a=b,c=d.
func options(s string) map[string]string {
	o := map[string]string{}
	for part := range strings.SplitSeq(s, ",") {
		k, v, _ := strings.Cut(part, "=")
		o[k] = v
	}
	return o
}

// mountsOf are the mount points of the device and its partitions on this host.
func mountsOf(path string) ([]string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil, nil
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	numbers := map[string]bool{number: true}
	parts, err := filepath.Glob("/sys/dev/block/" + number + "/*/partition")
	if err != nil {
		return nil, err
	}
	for _, p := range parts {
		if b, err := os.ReadFile(filepath.Join(filepath.Dir(p), "dev")); err == nil {
			numbers[strings.TrimSpace(string(b))] = true
		}
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) > 4 && numbers[f[2]] {
			out = append(out, procfs.Unescape(f[4]))
		}
	}
	return out, sc.Err()
}
