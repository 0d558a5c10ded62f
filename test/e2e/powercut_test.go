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

// beforeTheCut makes two points of /dev/vda, and goes on writing and backing up until
// the power fails.
const beforeTheCut = `set -e
mkdir /repo; mount -t ext4 /dev/vdb /repo
dd if=/dev/urandom of=/dev/vda bs=1M count=16 oflag=direct
tidemark init -r /repo/r
tidemark backup vm --disk /dev/vda -r /repo/r
dd if=/dev/urandom of=/dev/vda bs=4k count=1 seek=700 conv=notrunc oflag=direct
tidemark backup vm --disk /dev/vda -r /repo/r
write() { n=0; while n=$((n + 1)); do dd if=/dev/urandom of=/dev/vda bs=4k count=1 seek=$((n * 37 % 4096)) conv=notrunc oflag=direct 2> /dev/null; echo wrote $n; done; }
(write) & while :; do tidemark backup vm --disk /dev/vda -r /repo/r --quiesce none --allow-inconsistent; done`

const afterTheCut = `set -e
mkdir /repo; mount -t ext4 /dev/vdb /repo
echo before: $(tidemark points vm -r /repo/r | tail -n 1)
tidemark backup vm --disk /dev/vda -r /repo/r
tidemark restore vm -r /repo/r -o /tmp/out
cmp /tmp/out /dev/vda
tidemark verify vm -r /repo/r
echo the restored disk is the device`

// powerCut is a console that cuts the power some writes after a second point was made.
type powerCut struct {
	cut  context.CancelFunc
	seen bytes.Buffer
}

func (p *powerCut) Write(b []byte) (int, error) {
	p.seen.Write(b)
	if strings.Contains(p.seen.String(), "wrote 50") {
		p.cut()
	}
	return len(b), nil
}

// The power fails while a disk is written to and backed up. The next backup compares
// and says why, and its point is the disk.
func TestPowerCut(t *testing.T) {
	testvm.RequireVM(t)
	kernel, err := testvm.FetchKernel(t.Context(), testvm.KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("SKIP: no busybox (apt-get install busybox-static)")
	}
	disk, repo := filepath.Join(t.TempDir(), "disk"), filepath.Join(t.TempDir(), "repo")
	for file, size := range map[string]int64{disk: 16 << 20, repo: 256 << 20} {
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("mkfs.ext4", "-q", repo).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	boot := testvm.Run{
		Kernel:   kernel,
		Modules:  testvm.DefaultModules(),
		Optional: []string{"ext4"},
		Tools:    []string{binary},
		Disks:    []testvm.ScratchDisk{{Path: disk}, {Path: repo}},
		Programs: []testvm.Program{{Path: busybox, Args: []string{"sh", "-c", strings.ReplaceAll(beforeTheCut, "\n", "; ")}}},
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	powered, cut := context.WithCancel(ctx)
	defer cut()
	console := &powerCut{cut: cut}
	boot.Console = console
	if _, err := testvm.RunInKernel(powered, boot); !errors.Is(err, context.Canceled) {
		t.Fatalf("the power was not cut: %v\n%s", err, console.seen.String())
	}
	if log := console.seen.String(); strings.Count(log, "  tracked  ") == 0 {
		t.Errorf("no point was made by tracking:\n%s", log)
	}

	var after bytes.Buffer
	boot.Console = &after
	boot.Programs[0].Args[2] = strings.ReplaceAll(afterTheCut, "\n", "; ")
	res, err := testvm.RunInKernel(ctx, boot)
	if err != nil || res.Exit() != 0 {
		t.Fatalf("exit %d, %v\n%s", res.Exit(), err, after.String())
	}
	for _, want := range []string{"  compare  ", "compared with the last point, because: tracking of this device had not begun", "no tracker was attached", "the restored disk is the device"} {
		if !strings.Contains(after.String(), want) {
			t.Errorf("the log has no %q", want)
		}
	}
	for _, line := range strings.Split(after.String(), "\n") {
		if strings.Contains(line, "compare") || strings.HasPrefix(line, "before:") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if t.Failed() {
		t.Log(after.String())
	}
}
