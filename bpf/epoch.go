package bpf

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// mapping is an mmapable array of 64-bit words.
type mapping struct {
	mem   []byte
	words []uint64
}

func mapArray(m *ebpf.Map) (*mapping, error) { return mapWords(m, int(m.MaxEntries())) }

// mapWords maps n words.
func mapWords(m *ebpf.Map, n int) (*mapping, error) {
	size := (n*8 + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1)
	// Populated, so that reading a bitmap takes no page faults: it may be read in a pause.
	mem, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("mmap %s: %w", m, err)
	}
	return &mapping{mem: mem, words: unsafe.Slice((*uint64)(unsafe.Pointer(&mem[0])), n)}, nil
}

func (m *mapping) close() {
	if m.mem != nil {
		_ = unix.Munmap(m.mem)
		m.mem, m.words = nil, nil
	}
}

// Epoch is a span of time of one device and the granules written in it. A closed
// epoch changes no more, and may be read without locks until it is released.
type Epoch struct {
	m   *ebpf.Map
	id  ebpf.MapID
	mem *mapping
	pin string
}

func newEpoch(granules uint64) (*Epoch, error) {
	words := headerWords + (granules+63)/64
	if words > 1<<31 {
		return nil, fmt.Errorf("a bitmap of %d granules is too large", granules)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "tidemark_epoch", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: uint32(words),
		// Maps of different sizes in one outer map need both flags.
		Flags: unix.BPF_F_MMAPABLE | unix.BPF_F_INNER_MAP,
	})
	if err != nil {
		return nil, fmt.Errorf("bitmap of %d granules: %w", granules, err)
	}
	return wrapEpoch(m, "")
}

func loadEpoch(pin string) (*Epoch, error) {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		return nil, fmt.Errorf("pinned epoch: %w", err)
	}
	e, err := wrapEpoch(m, pin)
	if err != nil {
		return nil, err
	}
	if len(e.mem.words) < headerWords || e.mem.words[hdrMagic] != headerMagic {
		e.close()
		return nil, fmt.Errorf("%s: not an epoch of this version", filepath.Base(pin))
	}
	return e, nil
}

func wrapEpoch(m *ebpf.Map, pin string) (*Epoch, error) {
	info, err := m.Info()
	if err != nil {
		_ = m.Close()
		return nil, err
	}
	id, ok := info.ID()
	if !ok {
		_ = m.Close()
		return nil, errors.New("the kernel gives BPF maps no IDs (before 4.13)")
	}
	mem, err := mapArray(m)
	if err != nil {
		_ = m.Close()
		return nil, err
	}
	return &Epoch{m: m, id: id, mem: mem, pin: pin}, nil
}

func (e *Epoch) close() {
	e.mem.close()
	_ = e.m.Close()
}

func (e *Epoch) hdr(i int) uint64 { return e.mem.words[i] }

// First and Last are the numbers of the epochs whose writes are in here: more
// than one after a merge.
func (e *Epoch) First() uint64 { return e.hdr(hdrFirst) }

// Last is the number of the newest epoch in here.
func (e *Epoch) Last() uint64 { return e.hdr(hdrLast) }

// Size is the device's size in bytes when the epoch began.
func (e *Epoch) Size() int64 { return int64(e.hdr(hdrSize)) }

// GranuleShift is the base-2 logarithm of the granule in bytes.
func (e *Epoch) GranuleShift() uint { return uint(e.hdr(hdrShift)) }

// Granules is the number of bits in the bitmap.
func (e *Epoch) Granules() uint64 { return e.hdr(hdrGranules) }

// DiskSeq is the device's diskseq when the epoch began.
func (e *Epoch) DiskSeq() uint64 { return e.hdr(hdrDiskSeq) }

// Taint is what the programs found.
func (e *Epoch) Taint() Taint { return Taint(e.hdr(hdrTaint)) }

// Loss is what was found when the epoch was closed.
func (e *Epoch) Loss() Loss { return Loss(e.hdr(hdrLoss)) }

// Opened is when the epoch began.
func (e *Epoch) Opened() time.Time { return time.Unix(0, int64(e.hdr(hdrOpenedAt))) }

// Closed is when it ended.
func (e *Epoch) Closed() time.Time { return time.Unix(0, int64(e.hdr(hdrClosedAt))) }

// Sectors is the number of sectors (512 bytes) submitted for writing.
func (e *Epoch) Sectors() uint64 { return e.hdr(hdrSectors) }

// Landed is the number of sectors (512 bytes) whose writing completed.
func (e *Epoch) Landed() uint64 { return e.hdr(hdrLanded) }

// KernelSectors is what the kernel's own statistics counted meanwhile; false if they were
// not kept.
func (e *Epoch) KernelSectors() (uint64, bool) { return e.hdr(hdrKernel), e.hdr(hdrCounting) == 1 }

// Missed is, per program and copy, the events missed between opening and closing.
func (e *Epoch) Missed() []uint64 { return slices.Clone(e.missed()) }

func (e *Epoch) missed() []uint64 {
	n := min(e.hdr(hdrPrograms), hdrMissed-hdrMissBase)
	return e.mem.words[hdrMissed:][:n]
}

// LeastMissed is, per program, how many events every copy may have missed; as soon as it is not 0,
// the epoch has LossMissed.
func (e *Epoch) LeastMissed() []uint64 { return leastMissed(e.missed(), e.hdr(hdrVouched)) }

// Bitmap is one bit per granule, least significant first. It belongs to the
// epoch and must not be used after its release.
func (e *Epoch) Bitmap() []uint64 { return e.mem.words[headerWords:] }

// Dirty is the number of granules marked.
func (e *Epoch) Dirty() uint64 {
	var n int
	for _, w := range e.Bitmap() {
		n += bits.OnesCount64(w)
	}
	return uint64(n)
}

// merge adds what o saw. Both must be closed; o is the older neighbour.
func (e *Epoch) merge(o *Epoch) {
	dst, src := e.Bitmap(), o.Bitmap()
	for i, w := range src {
		if w != 0 {
			dst[i] |= w
		}
	}
	w := e.mem.words
	w[hdrTaint] |= o.hdr(hdrTaint)
	w[hdrLoss] |= o.hdr(hdrLoss)
	for i, n := range o.missed() {
		w[hdrMissed+i] += n
	}
	for _, i := range []int{hdrSectors, hdrLanded, hdrKernel} {
		w[i] += o.hdr(i)
	}
	w[hdrCounting] &= o.hdr(hdrCounting)
	w[hdrVouched] &= o.hdr(hdrVouched)
	w[hdrOpenedAt] = o.hdr(hdrOpenedAt)
	w[hdrFirst] = o.First()
	if o.hdr(hdrSaved) != 0 {
		copy(w[hdrSaved:hdrSaved+3], o.mem.words[hdrSaved:])
	}
}

// epochName is that of the pin of epoch n.
func epochName(n uint64) string { return fmt.Sprintf("e%016x", n) }
