package agent

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/internal/procfs"
)

// user is a process that has a disk open for writing.
type user struct {
	pid  int
	comm string
	args []string
}

// choose finds out who uses the disks and what can pause it. No Pauser means that
// the instant has to be found quiet; the text says why.
func choose(disks []*device) (Pauser, string, error) {
	users := map[int]user{}
	var mounts []string
	for _, d := range disks {
		us, err := usersOf(d.path)
		if err != nil {
			return nil, "", err
		}
		for _, u := range us {
			users[u.pid] = u
		}
		ms, err := mountsOf(d.path)
		if err != nil {
			return nil, "", err
		}
		mounts = append(mounts, ms...)
	}
	var names []string
	for _, pid := range slices.Sorted(maps.Keys(users)) {
		u := users[pid]
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

// usersOf finds the processes, but this one, that have the device open for writing.
func usersOf(path string) ([]user, error) {
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var out []user
	for _, p := range procs {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == os.Getpid() || !hasOpen(p, want) {
			continue
		}
		u := user{pid: pid}
		b, _ := os.ReadFile(p + "/comm")
		u.comm = strings.TrimSpace(string(b))
		b, _ = os.ReadFile(p + "/cmdline")
		for arg := range bytes.SplitSeq(bytes.TrimRight(b, "\x00"), []byte{0}) {
			u.args = append(u.args, string(arg))
		}
		out = append(out, u)
	}
	return out, nil
}

// hasOpen looks through the descriptors of a process, which may end meanwhile.
func hasOpen(proc string, want unix.Stat_t) bool {
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		return false
	}
	for _, fd := range fds {
		var st unix.Stat_t
		if unix.Stat(proc+"/fd/"+fd.Name(), &st) != nil || st.Mode&unix.S_IFMT != want.Mode&unix.S_IFMT {
			continue
		}
		same := st.Rdev == want.Rdev
		if want.Mode&unix.S_IFMT != unix.S_IFBLK {
			same = st.Dev == want.Dev && st.Ino == want.Ino
		}
		if same && opensForWriting(proc+"/fdinfo/"+fd.Name()) {
			return true
		}
	}
	return false
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
