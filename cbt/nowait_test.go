package cbt_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// io_uring submits without waiting. With more in flight than the queue has tags, bios are turned
// away before they become requests: they wrote nothing, and are no reason to compare.
func TestTurnedAwayWritesAreNoLoss(t *testing.T) {
	dev := loopDevice(t, truthSize, "")
	queue := filepath.Join("/sys/block", filepath.Base(dev), "queue/nr_requests")
	was, err := os.ReadFile(queue)
	if err == nil {
		err = os.WriteFile(queue, []byte("4"), 0)
	}
	if err != nil {
		t.Skip("SKIP: this loop device keeps its number of requests: ", err)
	}
	t.Cleanup(func() { _ = os.WriteFile(queue, was, 0) })
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	out, err := exec.Command("fio", "--name=x", "--filename="+dev, "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=io_uring", "--iodepth=128",
		"--numjobs=2", "--time_based", "--runtime=3").CombinedOutput()
	if err != nil {
		t.Skipf("SKIP: fio with io_uring: %v: %s", err, out)
	}
	if d := changes(t, s, id); len(d.Unknown) > 0 {
		t.Errorf("unknown because %v", d.Unknown)
	}
}
