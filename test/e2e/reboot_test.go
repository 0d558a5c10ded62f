package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// The disks of the guest: /dev/vda is never trusted, /dev/vdb holds the repository, the saved
// states and the file of /dev/loop0, /dev/vdc is trusted.
const rebootBegin = `mkdir -p /repo; mount -t ext4 /dev/vdb /repo || exit 1; losetup /dev/loop0 /repo/loop || exit 1
tm() { c=$1; shift; tidemark $c "$@" -r /repo/r --state-dir /repo/state; }
# dirty DEV BLOCK
dirty() { dd if=/dev/urandom of=$1 bs=4k count=1 seek=$2 conv=notrunc oflag=direct 2> /dev/null || exit 1; }
# same NAME DEV
same() { tidemark restore $1 -r /repo/r -o /tmp/out --quiet && cmp /tmp/out $2 && echo "$1 is right"; rm -f /tmp/out; }
`

const boot1 = rebootBegin + `tidemark init -r /repo/r
for d in vda vdc loop0; do dd if=/dev/urandom of=/dev/$d bs=1M count=8 oflag=direct 2> /dev/null; tm backup $d --disk /dev/$d || exit 1; dirty /dev/$d 700; done
tidemark suspend --state-dir /repo/state || exit 1
for d in vda vdc loop0; do dd if=/dev/zero of=/dev/$d bs=4k count=1 conv=fsync 2> /dev/null && echo "/dev/$d was written to"; done
cp -r /repo/state /repo/copy
sync`

// The trusted disk and the loop device go on; the state of the third proves nothing. An emulated processor may drop an
// event of the only copy of a program: nothing is saved then, the next backup compares and brings two more.
const boot2 = rebootBegin + `tm backup vda --disk /dev/vda
tm backup vdc --disk /dev/vdc --trust-saved-state
tm backup loop0 --disk /dev/loop0
for d in vda vdc loop0; do dirty /dev/$d 900; tm backup $d --disk /dev/$d; same $d /dev/$d || exit 1; done
echo "left: $(ls /repo/state | wc -l)"
suspend() { tidemark suspend /dev/vdc --state-dir /repo/state; }
suspend || { tm backup vdc --disk /dev/vdc && suspend; } || exit 1
sync`

// The disks get the states of two boots ago, but for /dev/vdc, to whose image the host wrote.
const boot3 = rebootBegin + `cp -n /repo/copy/* /repo/state/
for d in vda vdc loop0; do tm backup $d --disk /dev/$d; same $d /dev/$d || exit 1; done
echo "left: $(ls /repo/state | wc -l)"`

// A clean restart of the host, twice: what was saved is used where it can be believed, once,
// and all else compares and says why.
func TestReboot(t *testing.T) {
	testvm.RequireVM(t)
	kernel, err := testvm.FetchKernel(t.Context(), testvm.KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("SKIP: no busybox (apt-get install busybox-static)")
	}
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	files := filepath.Join(dir, "files")
	if err := os.Mkdir(files, 0o700); err != nil {
		t.Fatal(err)
	}
	for file, size := range map[string]int64{"a": 8 << 20, "b": 256 << 20, "c": 8 << 20, "files/loop": 8 << 20} {
		if err := errors.Join(os.WriteFile(path(file), nil, 0o600), os.Truncate(path(file), size)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-d", files, path("b")).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	boot := func(name, script string, want ...string) {
		t.Helper()
		var console bytes.Buffer
		file := path(name)
		if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
			t.Fatal(err)
		}
		res, err := testvm.RunInKernel(ctx, testvm.Run{
			Kernel: kernel, Modules: testvm.DefaultModules(), Optional: []string{"ext4"}, Tools: []string{binary}, Console: &console,
			Files:    map[string]string{"/" + name: file},
			Disks:    []testvm.ScratchDisk{{Path: path("a")}, {Path: path("b")}, {Path: path("c")}},
			Programs: []testvm.Program{{Path: busybox, Args: []string{"sh", "/" + name}}},
		})
		if err != nil || res.Exit() != 0 {
			t.Fatalf("%s: exit %d, %v\n%s", name, res.Exit(), err, console.String())
		}
		for _, w := range want {
			w, not := strings.CutPrefix(w, "not: ")
			if strings.Contains(console.String(), w) == not {
				t.Errorf("%s: wrong number of %q in the log", name, w)
			}
		}
		for line := range strings.Lines(console.String()) {
			if strings.Contains(line, "because") || strings.Contains(line, "  tracked  ") || strings.Contains(line, "is right") {
				t.Log(name, strings.TrimSpace(line))
			}
		}
		if strings.Contains(console.String(), "was written to\r") {
			t.Errorf("%s: a device could be written to after its state was saved", name)
		}
		if t.Failed() {
			t.Fatal(console.String())
		}
	}
	boot("boot1", boot1, "/dev/vda is saved", "/dev/vdc is saved", "/dev/loop0 is saved")
	boot("boot2", boot2,
		"/dev/vda: compared with the last point, because: the state saved before the last start was not used: nothing proves that no other system wrote",
		"not: /dev/vdc: compared", "not: /dev/loop0: compared", "vda is right", "vdc is right", "loop0 is right", "left: 0")
	f, err := os.OpenFile(path("c"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte("rescue"), 500), 2<<20); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	boot("boot3", boot3,
		"/dev/vda: compared with the last point, because: tracking of this device had not begun",
		"/dev/vdc: compared with the last point, because: the state saved before the last start was not used: nothing proves that no other system wrote",
		"/dev/loop0: compared with the last point, because: the state saved before the last start was not used: the device was written to since",
		"vda is right", "vdc is right", "loop0 is right", "left: 0")
}
