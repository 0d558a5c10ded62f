package cbt_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// One request may hold discards that lie far from each other, also in other partitions: its own range, which is
// the first one's start and the length of all, says nothing. A discard of a table that is made of pieces
// of two partitions becomes such a request, because its parts are merged before they are issued.
func TestDiscardsOfTwoPartitionsInOneRequest(t *testing.T) {
	dmTargets(t, "linear")
	disk := partitioned(t, scratchDisk(t, "nvme*n*", ""))
	pieces := mapped(t, disk.dev, "pieces", "0 2048 linear %s 0\n2048 2048 linear %s 2048\n4096 2048 linear %s 8192", disk.parts[0], disk.parts[1], disk.parts[0])
	second := 1<<20 + truthSize/3 // where the second partition begins

	// Submissions have marked the right granules already, were it not for this.
	o := bpf.Options{Dir: pinDir(t), Broken: bpf.BrokenNoSubmit}
	var of []*cbt.Tracked
	var at []cbt.ChangeID
	for _, dev := range []string{disk.dev, disk.parts[0], disk.parts[1]} {
		s := open(t, o, dev)
		of, at = append(of, s), append(at, changes(t, s, cbt.ChangeID{}).ID)
	}
	before := mergedDiscards(t, disk.dev)
	runTool(t, "blkdiscard", pieces)
	if n := mergedDiscards(t, disk.dev) - before; n != 2 {
		t.Fatalf("%d discards were merged, want 2: it shows nothing", n)
	}
	mib := func(off int64) cbt.Extent { return cbt.Extent{Off: off, Len: 1 << 20} }
	for i, want := range []cbt.Extents{
		{mib(1 << 20), mib(5 << 20), mib(second + 1<<20)},
		{mib(0), mib(4 << 20)},
		{mib(1 << 20)},
	} {
		d := changes(t, of[i], at[i])
		if len(d.Unknown) > 0 || !slices.Equal(d.Extents, want) {
			t.Errorf("source %d: %v, unknown because %v; want %v", i, d.Extents, d.Unknown, want)
		}
		if n := uint64(want.Bytes()) / 512; d.Evidence.Landed != n {
			t.Errorf("source %d: %d sectors completed, want %d", i, d.Evidence.Landed, n)
		}
	}
}

// mergedDiscards is the kernel's count (Documentation/block/stat.rst).
func mergedDiscards(t *testing.T, dev string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), "stat"))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b))
	if len(f) < 13 {
		t.Fatalf("%s has %d numbers", dev, len(f))
	}
	n, err := strconv.Atoi(f[12])
	if err != nil {
		t.Fatal(fmt.Errorf("%s: %w", dev, err))
	}
	return n
}
