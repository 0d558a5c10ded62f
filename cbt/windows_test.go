package cbt_test

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// The partitions of windowTable: 1 MiB to 33 MiB and 33 MiB to 65 MiB.
const (
	windowSize  = 96 << 20
	windowTable = "label: gpt\nstart=2048, size=65536\nstart=67584, size=65536\n"
)

// A partition is marked by what is written to it, by what is written through the disk, and
// by nothing else; disk and partitions are tracked beside each other.
func TestPartitionsAreWindows(t *testing.T) {
	dev, pins := loopDevice(t, windowSize, windowTable), pinDir(t)
	whole, p1, p2 := open(t, bpf.Options{Dir: pins}, dev), open(t, bpf.Options{Dir: pins}, dev+"p1"), open(t, bpf.Options{Dir: pins}, dev+"p2")
	at := make([]cbt.ChangeID, 3)
	all := []cbt.Source{whole, p1, p2}
	for i, s := range all {
		at[i] = changes(t, s, cbt.ChangeID{}).ID
	}
	check := func(what string, want ...cbt.Extents) {
		t.Helper()
		for i, s := range all {
			d := changes(t, s, at[i])
			at[i] = d.ID
			if len(d.Unknown) > 0 || !slices.Equal(d.Extents, want[i]) {
				t.Errorf("%s: source %d: %v, unknown %v; want %v", what, i, d.Extents, d.Unknown, want[i])
			}
		}
	}
	const g = 64 << 10
	one := func(off int64) cbt.Extents { return cbt.Extents{{Off: off, Len: g}} }
	write(t, dev, 2<<20)
	check("through the disk", one(2<<20), one(1<<20), nil)
	write(t, dev+"p2", 0)
	check("through the partition", one(33<<20), nil, one(0))
	write(t, dev, 33<<20-3) // across the border
	check("across the border", cbt.Extents{{Off: 33<<20 - g, Len: 2 * g}}, one(32<<20-g), one(0))
	write(t, dev, 80<<20)
	check("behind the partitions", one(80<<20), nil, nil)
}

func TestUnknownAfterPartitionMoved(t *testing.T) {
	dev, pins := loopDevice(t, windowSize, windowTable), pinDir(t)
	s := open(t, bpf.Options{Dir: pins}, dev+"p1")
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	for _, c := range [][]string{
		{"sh", "-c", fmt.Sprintf("printf 'label: gpt\\nstart=4096, size=65536\\n' | sfdisk -q --no-reread --force %s", dev)},
		{"partx", "-d", dev},
		{"partx", "-a", dev},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", c, err, out)
		}
	}
	s = open(t, bpf.Options{Dir: pins}, dev+"p1")
	// The kernel may give it another number: then it is a device that nobody tracked.
	wantUnknown(t, changes(t, s, id), 32<<20, "")
}

func TestWritersAreNamed(t *testing.T) {
	dev := loopDevice(t, small, "")
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	dd := func(args ...string) {
		t.Helper()
		args = append([]string{"if=/dev/zero", "of=" + dev, "conv=notrunc", "bs=64k", "count=3"}, args...)
		if out, err := exec.Command("dd", args...).CombinedOutput(); err != nil {
			t.Fatalf("dd: %v: %s", err, out)
		}
	}
	dd("oflag=direct")
	dd("seek=20")
	write(t, dev, 0)
	d := changes(t, s, id)
	var direct, cached, self bool
	for _, w := range d.Writers {
		direct = direct || w.Comm == "dd" && w.Bytes == 192<<10 && w.Dirtied == 0
		cached = cached || w.Comm == "dd" && w.Dirtied == 192<<10
		self = self || w.PID == os.Getpid() && w.Dirtied >= 4096
	}
	if !direct || !cached || !self {
		t.Errorf("direct %v, through the page cache %v, this process %v: %+v", direct, cached, self, d.Writers)
	}
	if d = changes(t, s, d.ID); len(d.Writers) != 0 {
		t.Errorf("nobody wrote: %+v", d.Writers)
	}
}

// The kernel's count is the programs' when all is seen, and where it isn't the epoch is unknown.
func TestKernelCountsTheSame(t *testing.T) {
	dev := loopDevice(t, small, "")
	s := open(t, bpf.Options{Dir: pinDir(t)}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	write(t, dev, 1<<20)
	if out, err := exec.Command("blkdiscard", "-o", "2097152", "-l", "1048576", dev).CombinedOutput(); err != nil {
		t.Fatalf("blkdiscard: %v: %s", err, out)
	}
	d := changes(t, s, id)
	want := uint64(8 + 2048)
	if d.Evidence.KernelSectors == nil || *d.Evidence.KernelSectors != want || d.Evidence.Sectors != want || d.Evidence.Landed != want {
		t.Errorf("kernel %v, submitted %d, completed %d, want %d", d.Evidence.KernelSectors, d.Evidence.Sectors, d.Evidence.Landed, want)
	}
}

func TestUnknownWhereTheKernelCountsMore(t *testing.T) {
	dev := loopDevice(t, windowSize, "")
	s := open(t, bpf.Options{Dir: pinDir(t), Broken: bpf.BrokenBlind}, dev)
	id := changes(t, s, cbt.ChangeID{}).ID
	if out, err := exec.Command("dd", "if=/dev/zero", "of="+dev, "bs=1M", "count="+strconv.Itoa(windowSize>>20), "oflag=direct", "conv=notrunc").CombinedOutput(); err != nil {
		t.Fatalf("dd: %v: %s", err, out)
	}
	time.Sleep(10 * time.Millisecond)
	wantUnknown(t, changes(t, s, id), windowSize, "the kernel counted more")
}

func TestTruthWithAllWindowsOfADisk(t *testing.T) {
	var table strings.Builder
	table.WriteString("label: gpt\n")
	for i := range 12 {
		fmt.Fprintf(&table, "start=%d, size=4096\n", 2048+4096*i)
	}
	dev, pins := loopDevice(t, windowSize, table.String()), pinDir(t)
	for i := 12; i > 0; i-- {
		part := dev + "p" + strconv.Itoa(i)
		s := open(t, bpf.Options{Dir: pins}, part)
		id := changes(t, s, cbt.ChangeID{}).ID
		write(t, part, 65536)
		if d := changes(t, s, id); !slices.Equal(d.Extents, cbt.Extents{{Off: 65536, Len: 65536}}) || len(d.Unknown) > 0 {
			t.Errorf("%s: %v, unknown %v", part, d.Extents, d.Unknown)
		}
	}
}
