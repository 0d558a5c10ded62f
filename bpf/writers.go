package bpf

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
)

// Writer is a process that wrote to a device. The numbers name it; they prove nothing.
type Writer struct {
	PID     int
	Comm    string // its name when it first wrote
	Kernel  bool   // a kernel thread
	Writes  uint64 // bios that it submitted
	Bytes   uint64 // in them
	Dirtied uint64 // bytes of the page cache that it dirtied, which a kernel thread submits later
}

// Writers are the processes that wrote in the epochs from first to last, those that wrote
// most first. False if the table was full and some may be missing.
func (r *Registration) Writers(first, last uint64) ([]Writer, bool, error) {
	byPID := map[int]*Writer{}
	add := func(tgid uint32, comm []int8, kernel bool, writes, bytes, dirtied uint64) {
		w := byPID[int(tgid)]
		if w == nil {
			w = &Writer{PID: int(tgid), Comm: commOf(comm), Kernel: kernel}
			byPID[w.PID] = w
		}
		w.Writes += writes
		w.Bytes += bytes
		w.Dirtied += dirtied
	}
	var perCPU []trackerCounters
	if err := r.t.maps.Counts.Lookup(r.slot, &perCPU); err != nil {
		return nil, false, fmt.Errorf("counters: %w", err)
	}
	for _, v := range perCPU {
		if v.WriterWrites > 0 && v.WriterEpoch >= first && v.WriterEpoch <= last {
			add(v.WriterTgid, v.WriterComm[:], v.WriterKernel != 0, v.WriterWrites, v.WriterBytes, 0)
		}
	}
	err := r.t.eachWriter(r.slot, first, last, func(k trackerWriterKey, v trackerWriter) error {
		add(k.Tgid, v.Comm[:], v.Kernel != 0, v.Writes, v.Bytes, v.Dirtied)
		return nil
	})
	out := make([]Writer, 0, len(byPID))
	for _, w := range byPID {
		out = append(out, *w)
	}
	slices.SortFunc(out, func(a, b Writer) int {
		return cmp.Or(cmp.Compare(b.Bytes+b.Dirtied, a.Bytes+a.Dirtied), cmp.Compare(a.PID, b.PID))
	})
	return out, r.t.hostMap.words[hostWriters] == 0, err
}

func commOf(c []int8) string {
	b := make([]byte, len(c))
	for i, v := range c {
		b[i] = byte(v)
	}
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}

func (t *Tracker) eachWriter(slot uint32, first, last uint64, f func(trackerWriterKey, trackerWriter) error) error {
	var k trackerWriterKey
	var v trackerWriter
	it := t.maps.Writers.Iterate()
	for it.Next(&k, &v) {
		if k.Slot != slot || k.Epoch < first || k.Epoch > last {
			continue
		}
		if err := f(k, v); err != nil {
			return err
		}
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read the writers: %w", err)
	}
	return nil
}

// forgetWriters makes room for others.
func (t *Tracker) forgetWriters(slot uint32, first, last uint64) error {
	var gone []trackerWriterKey
	err := t.eachWriter(slot, first, last, func(k trackerWriterKey, _ trackerWriter) error {
		gone = append(gone, k)
		return nil
	})
	for _, k := range gone {
		if e := t.maps.Writers.Delete(k); e != nil && !errors.Is(e, ebpf.ErrKeyNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
