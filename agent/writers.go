package agent

import (
	"cmp"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// maxWriters bounds how many are named in a point.
const maxWriters = 32

// vmms are the names, or the beginnings of them, of programs that run VMs.
var vmms = []string{"qemu", "kvm", "cloud-hyperv", "firecracker", "crosvm", "tapdisk", "blkback", "VBoxHeadless", "vmware-vmx", "dragonball"}

// wrote adds up who wrote to the disk since the last point.
func (d *disk) wrote(ws []cbt.Writer) {
	if d.writers == nil {
		d.writers = map[int]cbt.Writer{}
	}
	for _, w := range ws {
		sum := d.writers[w.PID]
		sum.PID, sum.Comm, sum.Kernel = w.PID, w.Comm, w.Kernel
		sum.Writes += w.Writes
		sum.Bytes += w.Bytes
		sum.Dirtied += w.Dirtied
		d.writers[w.PID] = sum
	}
}

// role says what a writer is to the VM.
func (d *disk) role(w cbt.Writer, vm int) string {
	switch {
	case w.PID == vm && vm != 0:
		return store.WriterVM
	case slices.ContainsFunc(vmms, func(name string) bool { return strings.HasPrefix(d.holders[w.PID], name) }):
		return store.WriterVM
	case w.Kernel || w.PID == os.Getpid():
		return store.WriterKernel
	}
	return store.WriterOther
}

// named are the writers as the point tells of them, those that wrote most first.
func (d *disk) named(vm int) []store.WrittenBy {
	var out []store.WrittenBy
	for _, w := range d.writers {
		if name := d.holders[w.PID]; name != "" {
			w.Comm = name // the tracker saw the name of a thread
		}
		out = append(out, store.WrittenBy{PID: w.PID, Comm: w.Comm, Role: d.role(w, vm), Writes: w.Writes, Bytes: w.Bytes, Dirtied: w.Dirtied})
	}
	slices.SortFunc(out, func(a, b store.WrittenBy) int {
		return cmp.Or(cmp.Compare(b.Bytes+b.Dirtied, a.Bytes+a.Dirtied), cmp.Compare(a.PID, b.PID))
	})
	if len(out) <= maxWriters {
		return out
	}
	rest := store.WrittenBy{Comm: strconv.Itoa(len(out)-maxWriters+1) + " more", Role: store.WriterOther}
	for _, w := range out[maxWriters-1:] {
		rest.Writes += w.Writes
		rest.Bytes += w.Bytes
		rest.Dirtied += w.Dirtied
	}
	return append(out[:maxWriters-1], rest)
}

// held remembers who has disk number i open for writing.
func (d *disk) held(users []user, i int) {
	d.holders = map[int]string{}
	for _, u := range users {
		if u.disks[i] {
			d.holders[u.pid] = u.comm
		}
	}
}

// heldBy finds out which writers have the disk open that nobody had when the backup began.
func (d *disk) heldBy(writers map[int]cbt.Writer) {
	var want unix.Stat_t
	if unix.Stat(d.path, &want) != nil {
		return // what was read is as good without
	}
	for pid, w := range writers {
		if _, known := d.holders[pid]; !known && !w.Kernel && slices.Contains(hasOpen(pid, []unix.Stat_t{want}), true) {
			d.holders[pid] = commOf(pid)
		}
	}
}

// Others are the writers of a point that are neither the VM nor the kernel, over all disks.
func Others(p *store.Point) []store.WrittenBy {
	sum := map[int]store.WrittenBy{}
	for _, d := range p.Disks {
		for _, w := range d.Tracking.Writers {
			if w.Role != store.WriterOther {
				continue
			}
			was := sum[w.PID]
			w.Writes += was.Writes
			w.Bytes += was.Bytes
			w.Dirtied += was.Dirtied
			sum[w.PID] = w
		}
	}
	return slices.SortedFunc(maps.Values(sum), func(a, b store.WrittenBy) int {
		return cmp.Or(cmp.Compare(b.Bytes+b.Dirtied, a.Bytes+a.Dirtied), cmp.Compare(a.PID, b.PID))
	})
}
