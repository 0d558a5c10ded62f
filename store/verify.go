package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
)

// maxProblems bounds the problems that a report lists.
const maxProblems = 10000

// Problem is something of a point that cannot be read as it was written.
type Problem struct {
	Object string `json:"object"`         // name of the object at fault, as far as is known
	Disk   string `json:"disk,omitempty"` // the disk that suffers; empty: the whole point
	Off    int64  `json:"off"`            // the extent of the disk that cannot be read, in bytes
	Len    int64  `json:"len"`
	What   string `json:"what"` // for a person
}

// VerifyReport says what was checked and what was found.
type VerifyReport struct {
	Point    PointName `json:"point"`
	Full     bool      `json:"full"`
	Sample   *Sample   `json:"sample,omitempty"`
	Nodes    int64     `json:"nodes"`  // map nodes read and checked
	Grains   int64     `json:"grains"` // grains located in a checked pack index
	Read     int64     `json:"read"`   // of these, grains read and hashed: all if Full, but for Shared
	Shared   int64     `json:"shared"` // of these, grains that were read and hashed for another point of the same Verification
	Packs    int64     `json:"packs"`  // packs whose index was read and checked
	Bytes    int64     `json:"bytes"`  // content hashed, without map nodes
	Problems []Problem `json:"problems,omitempty"`
	Omitted  int64     `json:"omitted,omitempty"` // problems found beyond the 10000 listed
}

// OK tells whether nothing was found.
func (r *VerifyReport) OK() bool { return len(r.Problems) == 0 }

// Verify checks a point against what is stored now, past all caches. Quick checks
// the document, every map node and that each grain's place exists in an intact
// pack index. Full also reads every grain and compares its hash.
//
// Problems are in the report, all of them, neighbouring extents joined; the error is
// for what kept the check from being done, such as a cancelled context.
// progress may be nil; it is called from one goroutine at a time with the bytes
// of disk dealt with and to deal with.
func (r *Repo) Verify(ctx context.Context, p *Point, full bool, progress func(done, total int64)) (VerifyReport, error) {
	return r.verify(ctx, p, full, nil, progress)
}

// Sample is a part of all grains, drawn by their content.
type Sample struct {
	Part float64 `json:"part"` // from 0 to 1
	Seed uint64  `json:"seed"` // the same draws the same
}

// has tells whether a grain is in the sample: if a number made of its hash and the seed, by
// the finalizer of SplitMix64 (Steele et al., OOPSLA 2014), lies in the part.
func (s Sample) has(h Hash) bool {
	x := hashPrefix(h) ^ s.Seed*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	x ^= x >> 31
	return float64(x>>11) < s.Part*(1<<53)
}

// VerifySample is as Verify, but reads the grains of a sample. What a run with one
// seed has left out, another seed may draw.
func (r *Repo) VerifySample(ctx context.Context, p *Point, s Sample, progress func(done, total int64)) (VerifyReport, error) {
	if !(s.Part >= 0 && s.Part <= 1) {
		return VerifyReport{}, fmt.Errorf("%w: a sample of %v", ErrInvalid, s.Part)
	}
	return r.verify(ctx, p, false, &s, progress)
}

func (r *Repo) verify(ctx context.Context, p *Point, full bool, s *Sample, progress func(done, total int64)) (VerifyReport, error) {
	v, err := r.newVerification(full, s)
	if err != nil {
		return VerifyReport{}, err
	}
	v.known = nil
	_, err = r.Point(ctx, p.Name())
	return v.point(ctx, p.Name(), p, err, progress)
}

// Verification verifies points one after the other, and reads what they share once. Not for concurrent
// use. Memory: a bit per record that was read, and some 100 bytes per pack of these: 32 MiB and 50 MiB for 16 TiB stored
// as grains of 64 KiB; and the caches of a reader, 128 MiB at most.
type Verification struct {
	repo   *Repo
	r      *reader
	full   bool
	sample *Sample
	known  *marks
}

// NewVerification begins one that reads all grains.
func (r *Repo) NewVerification() (*Verification, error) { return r.newVerification(true, nil) }

// NewQuickVerification begins one that reads no grains but those of the sample, if that is not nil.
func (r *Repo) NewQuickVerification(s *Sample) (*Verification, error) {
	if s != nil && !(s.Part >= 0 && s.Part <= 1) {
		return nil, fmt.Errorf("%w: a sample of %v", ErrInvalid, s.Part)
	}
	return r.newVerification(false, s)
}

func (r *Repo) newVerification(full bool, s *Sample) (*Verification, error) {
	fresh, err := newReader(r.blobs, r.repo, r.codec, r.keys)
	if err != nil {
		return nil, err
	}
	return &Verification{r, fresh, full, s, newMarks()}, nil
}

// Point is as [Repo.Verify]. A document that is damaged is a problem of the report; the error wraps ErrNotFound if there
// is none.
func (v *Verification) Point(ctx context.Context, n PointName, progress func(done, total int64)) (VerifyReport, error) {
	p, err := v.repo.Point(ctx, n)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return VerifyReport{Point: n}, fmt.Errorf("verify %s: %w", n, err)
	}
	return v.point(ctx, n, p, err, progress)
}

// point verifies p, which may be nil; broken is what is wrong with its document.
func (v *Verification) point(ctx context.Context, n PointName, p *Point, broken error, progress func(done, total int64)) (VerifyReport, error) {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	w := &verifier{
		r: v.r, full: v.full, sample: v.sample, known: v.known, progress: progress,
		report: VerifyReport{Point: n, Full: v.full, Sample: v.sample},
		packs:  map[PackID]struct{}{},
	}
	if broken != nil {
		if ctx.Err() != nil {
			return w.report, ctx.Err()
		}
		w.problem(Problem{Object: v.r.pointObject(n), What: broken.Error()})
	}
	if p == nil {
		return w.report, nil
	}
	for i := range p.Disks {
		w.total += p.Disks[i].Root.Size
	}
	for i := range p.Disks {
		if err := w.disk(ctx, &p.Disks[i]); err != nil {
			return w.report, fmt.Errorf("verify %s: %w", n, err)
		}
	}
	w.report.Packs = int64(len(w.packs))
	return w.report, nil
}

type verifier struct {
	r      *reader
	full   bool
	sample *Sample
	known  *marks             // grains that needn't be read again; nil: none
	missed func(missed) error // told all that is found; nil: it goes to the report

	mu       sync.Mutex
	report   VerifyReport
	packs    map[PackID]struct{} // whose index was good: 16 bytes each
	progress func(done, total int64)
	done     int64
	total    int64
}

func (v *verifier) disk(ctx context.Context, d *Disk) error {
	if err := d.Root.validate(); err != nil {
		v.problem(Problem{Object: v.r.pointObject(v.report.Point), Disk: d.Name, Len: max(d.Root.Size, 0), What: err.Error()})
		return nil
	}
	defer v.tidy(len(v.report.Problems))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(1 + runtime.GOMAXPROCS(0))
	w := &verifyDisk{v, d, g}
	g.Go(func() error { return w.node(ctx, d.Root.Ref, int(d.Root.Level), 0) })
	return g.Wait()
}

type verifyDisk struct {
	*verifier
	d *Disk
	g *errgroup.Group
}

// bytes turns grains into an extent of the disk.
func (w *verifyDisk) bytes(first, count int64) (off, n int64) {
	size, grain := w.d.Root.Size, int64(w.d.Root.Grain)
	off = min(first*grain, size)
	if end := first + count; end < w.d.Root.grains() {
		return off, count * grain
	}
	return off, size - off
}

// node checks the node whose first grain is first, and all below. It runs in one
// goroutine; leaves go to others.
func (w *verifyDisk) node(ctx context.Context, ref Ref, level int, first int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	off, n := w.bytes(first, fanOut*span(level))
	if ref.IsZero() {
		w.advance(n)
		return nil
	}
	// Not through the cache of nodes: each is read once and checked.
	nd, err := w.r.loadNode(ctx, ref)
	if err == nil && int(nd.level) != level {
		err = recordError(ref, fmt.Sprintf("a map node of level %d, not %d", nd.level, level))
	}
	if err == nil {
		// The map must not say more than the disk has.
		if have := (w.d.Root.grains() - first + span(level) - 1) / span(level); int64(bits.Len64(nd.present)) > have {
			err = recordError(ref, "a map node with children beyond the end of the disk")
		}
	}
	if err != nil {
		w.advance(n)
		return w.found(ctx, missed{ref: ref, kind: kindNode, raw: 1, off: off, n: n}, err)
	}
	w.good(ref.Pack, func(r *VerifyReport) { r.Nodes++ })
	if level == 0 {
		w.g.Go(func() error { return w.leaf(ctx, nd, first) })
		return nil
	}
	for i := range fanOut {
		at := first + int64(i)*span(level)
		if at >= w.d.Root.grains() {
			break
		}
		if err := w.node(ctx, nd.child(i), level-1, at); err != nil {
			return err
		}
	}
	return nil
}

func (w *verifyDisk) leaf(ctx context.Context, nd *node, first int64) error {
	buf := make([]byte, w.d.Root.Grain)
	for i := range fanOut {
		off, n := w.bytes(first+int64(i), 1)
		if n == 0 {
			break
		}
		if ref := nd.child(i); !ref.IsZero() {
			if err := w.grain(ctx, ref, buf); err != nil {
				if err := w.found(ctx, missed{ref: ref, kind: kindData, raw: uint32(len(buf)), off: off, n: n}, err); err != nil {
					return err
				}
			}
		}
		w.advance(n)
	}
	return ctx.Err()
}

func (w *verifyDisk) grain(ctx context.Context, ref Ref, buf []byte) error {
	var err error
	wanted := w.full || w.sample != nil && w.sample.has(ref.Hash)
	read := wanted && !w.known.has(ref)
	if read {
		err = w.r.grain(ctx, ref, buf)
	} else {
		err = w.r.following(ctx, ref.Pack, func(x *packIndex) error {
			_, err := x.locateGrain(ref, len(buf))
			return err
		})
	}
	if err != nil {
		return err
	}
	if read && w.known != nil {
		w.known.add(ref)
	}
	w.good(ref.Pack, func(r *VerifyReport) {
		r.Grains++
		if read {
			r.Read++
			r.Bytes += int64(len(buf))
		} else if wanted {
			r.Shared++
		}
	})
	return nil
}

// missed is a record that can't be read, and the extent of the disk that needs it, in bytes.
type missed struct {
	disk   string
	off, n int64
	ref    Ref
	kind   packKind
	raw    uint32 // length, as far as is known: at least 1
	object string
	what   string
}

// found reports a problem, unless it is only that the check was stopped.
func (w *verifyDisk) found(ctx context.Context, m missed, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	m.disk, m.object, m.what = w.d.Name, packName(m.ref.Pack), err.Error()
	var c *CorruptError
	if errors.As(err, &c) {
		m.object, m.what = c.Object, c.What
	}
	if w.missed != nil {
		if c == nil { // it may be read yet: nothing is to be decided
			return err
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.missed(m)
	}
	w.problem(Problem{Object: m.object, Disk: m.disk, Off: m.off, Len: m.n, What: m.what})
	return nil
}

func (v *verifier) problem(p Problem) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if n := len(v.report.Problems); n > 0 && v.report.Problems[n-1].join(p) {
		return
	}
	if len(v.report.Problems) == maxProblems {
		v.report.Omitted++
		return
	}
	v.report.Problems = append(v.report.Problems, p)
}

// join adds q to p if it is the same problem of the next extent.
func (p *Problem) join(q Problem) bool {
	if q.Object != p.Object || q.Disk != p.Disk || q.What != p.What || p.Off+p.Len != q.Off {
		return false
	}
	p.Len += q.Len
	return true
}

// tidy puts the problems of a disk, which were found by several goroutines, in order.
func (v *verifier) tidy(from int) {
	found := v.report.Problems[from:]
	slices.SortFunc(found, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Off, b.Off), cmp.Compare(a.What, b.What))
	})
	out := v.report.Problems[:from]
	for _, p := range found {
		if len(out) == from || !out[len(out)-1].join(p) {
			out = append(out, p)
		}
	}
	v.report.Problems = out
}

func (v *verifier) good(pack PackID, count func(*VerifyReport)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	count(&v.report)
	v.packs[pack] = struct{}{}
}

func (v *verifier) advance(n int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.done += n
	v.progress(v.done, v.total)
}
