package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"tidemark": main})
}

// Each file in testdata/script shows one behaviour of the command line. Conditions:
// [root] BPF programs and loop devices can be used, [fuse] FUSE too, [filehooks] this kernel
// can track image files. "hold FILE" opens a file for writing until "release FILE".
// [s3] there is an S3 server, and "s3 VAR" starts it and puts a repository's location in $VAR.
// "relayout VERSION" makes the pinned tracker one of another map layout. "loop VAR SIZE" attaches a loop device and puts its path in $VAR.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                "testdata/script",
		RequireUniqueNames: true,
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "filehooks":
				return bpf.CanTrackFiles("ext4") == nil, nil
			case "s3":
				_, err := s3test.Find()
				return err == nil, nil
			case "fuse":
				_, err := os.Stat("/dev/fuse")
				return err == nil && os.Geteuid() == 0, nil
			}
			return false, nil
		},
		Setup: func(e *testscript.Env) error {
			e.Setenv("XDG_STATE_HOME", filepath.Join(e.WorkDir, "xdg"))
			e.Setenv("PINS", fmt.Sprintf("/sys/fs/bpf/tidemark-script-%d-%s", os.Getpid(), filepath.Base(e.WorkDir)))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"loop": loop, "s3": s3Server, "write": write, "forge": forge, "hold": hold, "release": release, "relayout": relayout},
	})
}

// loop VAR SIZE
func loop(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: loop VAR SIZE")
	}
	file := ts.MkAbs("disk-" + args[0])
	ts.Check(exec.Command("truncate", "-s", args[1], file).Run())
	out, err := exec.Command("losetup", "--show", "-f", file).CombinedOutput()
	if err != nil {
		ts.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	ts.Setenv(args[0], dev)
	ts.Setenv("FILE"+filepath.Base(dev), file)
	pins := ts.Getenv("PINS")
	ts.Defer(func() {
		_ = exec.Command("blockdev", "--setrw", dev).Run() // else it stays so for whoever gets it next
		_ = exec.Command("losetup", "-d", dev).Run()
		self, err := os.Executable()
		if err == nil {
			c := exec.Command(filepath.Join(filepath.Dir(self), "tidemark"), "untrack", "--all", "--pin-dir", pins, "--state-dir", ts.MkAbs("state"))
			_ = c.Run()
		}
		_ = os.RemoveAll(pins)
	})
}

// s3 VAR
func s3Server(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: s3 VAR")
	}
	program, err := s3test.Find()
	ts.Check(err)
	srv, stop, err := s3test.Run(context.Background(), program, ts.MkAbs("s3-"+args[0]))
	ts.Check(err)
	ts.Defer(stop)
	for name, value := range s3test.Env() {
		ts.Setenv(name, value)
	}
	ts.Setenv(args[0], "s3:"+srv.Endpoint+"/"+s3test.Bucket+"/repo")
}

// write FILE TEXT writes TEXT to the beginning of a file or device.
func write(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: write FILE TEXT")
	}
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_WRONLY|os.O_SYNC, 0)
	ts.Check(err)
	defer func() { _ = f.Close() }()
	_, err = f.WriteAt([]byte(args[1]), 0)
	ts.Check(err)
}

// forge DEV OFFSET TEXT writes to the file below a loop device, where the tracker can't see it.
func forge(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: forge DEV OFFSET TEXT")
	}
	off, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	f, err := os.OpenFile(ts.Getenv("FILE"+filepath.Base(args[0])), os.O_WRONLY|os.O_SYNC, 0)
	ts.Check(err)
	defer func() { _ = f.Close() }()
	_, err = f.WriteAt([]byte(args[2]), off)
	ts.Check(err)
	// Else readers of the device may be given what lies in its page cache.
	ts.Check(exec.Command("blockdev", "--flushbufs", args[0]).Run())
}

// relayout VERSION makes the tracker one of another layout.
func relayout(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: relayout VERSION")
	}
	version, err := strconv.ParseUint(args[0], 10, 16)
	ts.Check(err)
	meta, err := ebpf.LoadPinnedMap(filepath.Join(ts.Getenv("PINS"), "gen-1", "meta"), nil)
	ts.Check(err)
	defer func() { _ = meta.Close() }()
	var magic uint64
	ts.Check(meta.Lookup(uint32(0), &magic))
	ts.Check(meta.Put(uint32(0), magic&^0xffff|version))
}

// held are the files that scripts have open for writing.
var held sync.Map

// hold FILE
func hold(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: hold FILE")
	}
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	held.Store(f.Name(), f)
	ts.Defer(func() { _ = f.Close() })
}

// release FILE
func release(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: release FILE")
	}
	if f, ok := held.LoadAndDelete(ts.MkAbs(args[0])); ok {
		ts.Check(f.(*os.File).Close())
	}
}
