package cbt_test

import (
	"os/exec"
	"testing"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// Commands to a controller that carry no data and change what its disks hold are no bios, and
// no requests of a disk.
func TestUnknownAfterNVMeFormat(t *testing.T) {
	dev := scratchDisk(t, "nvme*n*", "")
	if _, err := exec.LookPath("nvme"); err != nil {
		t.Skip("SKIP: no nvme (apt-get install nvme-cli)")
	}
	size, err := deviceSize(dev)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	for _, harmless := range []string{"id-ctrl", "smart-log", "list-ns"} {
		runTool(t, "nvme", harmless, dev)
	}
	d := changes(t, s, id)
	if len(d.Unknown) > 0 {
		t.Errorf("harmless commands: unknown because %v", d.Unknown)
	}
	runTool(t, "nvme", "format", dev, "--force")
	wantUnknown(t, changes(t, s, d.ID), size, "passthrough command")
}
