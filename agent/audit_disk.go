package agent

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// What is kept of mismatches: more tell nothing new.
const (
	maxKept       = 16   // with their content
	maxMismatches = 1024 // the audit of the disk ends there
)

// diskAudit is the audit of one disk.
type diskAudit struct {
	*Audit
	point *store.Point
	disk  *store.Disk
	rand  *rand.Rand
	meter meter
	until time.Time // of this disk's part of Until; never if zero

	dev         *device
	src         cbt.Auditor
	since       cbt.ChangeID
	content     *store.Map
	grain, unit int64 // bytes
	draw        *draw
	want        int64 // granules to draw

	mu       sync.Mutex // guards all below, draw, and src but for Marked
	out      AuditedDisk
	good     []uint64 // bit per granule
	suspects []suspect
	next     time.Time // when the rate allows the next read
	evidence cbt.Evidence
	proof    error // why what the tracker says ceased to be proven
}

// auditReaders is how many reads an audit has under way: it must not be in anybody's way.
const auditReaders = 2

// suspect is a granule that differed, and may be read again at due.
type suspect struct {
	off int64
	due time.Time
}

// task is a run of granules to read.
type task struct {
	off, n int64
	again  bool // a suspect
}

func (d *diskAudit) run(ctx context.Context) (err error) {
	if err := d.open(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.src.Close(), d.dev.f.Close()) }()
	marks, err := d.marks()
	if err != nil {
		return err
	}
	d.prepare(marks)
	work, ctx2 := errgroup.WithContext(ctx)
	for range auditReaders {
		work.Go(func() error {
			// The thread keeps its priority, so it ends with this goroutine.
			runtime.LockOSThread()
			lowPriority()
			return d.work(ctx2)
		})
	}
	if err = work.Wait(); err == nil {
		err = d.proof
	}
	// Again: losses and marks that came meanwhile count too.
	marks, late := d.marks()
	if err == nil && d.out.Mismatched == 0 {
		err = late
	}
	d.sum(marks, err == nil)
	if d.out.Mismatched > 0 {
		err = errors.Join(d.alarm(ctx), err)
	}
	return err
}

// open takes hold of the device and its tracking, if they are those of the last point.
func (d *diskAudit) open(ctx context.Context) (err error) {
	path, root := d.out.Path, d.disk.Root
	if d.since, err = cbt.ParseChangeID(d.disk.ChangeID); err != nil {
		return fmt.Errorf("%s: %w: %w", path, ErrNotAuditable, err)
	}
	if d.since.IsZero() {
		return fmt.Errorf("%s: %w: its writes were not tracked when the last point was made", path, ErrNotAuditable)
	}
	if d.content, err = d.Repo.Map(root); err != nil {
		return err
	}
	if d.dev, err = openDevice(path); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.dev.f.Close())
		}
	}()
	if d.dev.size != root.Size {
		return fmt.Errorf("%s: %w: it has %d bytes, at the last point it had %d", path, ErrNotAuditable, d.dev.size, root.Size)
	}
	if d.src, err = d.Source(ctx, path); err != nil {
		return err
	}
	// A backup that ended before the device was held has given up what the point needs.
	p, err := d.lastPoint(ctx)
	if err == nil && p.ID != d.point.ID {
		err = fmt.Errorf("%s: %w: a backup has made another point meanwhile, audit again", path, ErrNotAuditable)
	}
	if err != nil {
		err = errors.Join(err, d.src.Close())
	}
	return err
}

// marks asks what may have changed since the point, and checks that it is the device
// that is read. The caller holds mu, or is alone.
func (d *diskAudit) marks() (cbt.Bitmap, error) {
	marks, ev, err := d.src.Marks(d.since)
	if d.out.Mismatched == 0 {
		d.evidence = ev
	}
	if err != nil {
		return marks, err
	}
	if err := d.dev.same(ev); err != nil {
		return marks, fmt.Errorf("%s: %w: %w", d.out.Path, cbt.ErrUnproven, err)
	}
	return marks, nil
}

// prepare decides what to read.
func (d *diskAudit) prepare(marks cbt.Bitmap) {
	d.grain = int64(d.disk.Root.Grain)
	d.unit = max(d.grain, 1<<marks.Shift)
	changed := widen(marks, d.unit)
	n := (d.dev.size + d.unit - 1) / d.unit
	d.draw = newDraw(changed, n, d.rand)
	d.good = make([]uint64, len(changed))
	d.out.Granule, d.out.Granules, d.out.Unchanged = d.unit, n, d.draw.left
	d.want = d.Samples
	if d.want == 0 {
		d.want = max(MinAuditSamples, int64(d.Fraction*float64(d.draw.left)))
	}
	d.want = min(d.want, d.draw.left)
	if d.All {
		d.want = d.draw.left
	}
	d.meter.start(Progress{Round: 1, Total: d.want * d.unit, Phase: "auditing " + d.out.Name})
}

// widen makes a bitmap with a bit per unit bytes, a power of two not less than the granule: what the
// next backup would read. Bits behind the end of the disk are set.
func widen(marks cbt.Bitmap, unit int64) []uint64 {
	n := (marks.Size + unit - 1) / unit
	out := make([]uint64, (n+63)/64)
	by := uint(bits.TrailingZeros64(uint64(unit))) - marks.Shift
	for i, w := range marks.Words {
		for ; w != 0; w &= w - 1 {
			u := (int64(i)*64 + int64(bits.TrailingZeros64(w))) >> by
			if u < n {
				out[u/64] |= 1 << (u % 64)
			}
		}
	}
	if n%64 != 0 {
		out[n/64] |= ^uint64(0) << (n % 64)
	}
	return out
}

// work reads until there is nothing left to do.
func (d *diskAudit) work(ctx context.Context) error {
	buf := alignedBuffer(readChunk)
	for {
		t, ok, err := d.take(ctx)
		if err != nil || !ok {
			return err
		}
		p := buf[:t.n]
		if err := d.dev.readAt(p, t.off); err != nil {
			return err
		}
		for off := t.off; off < t.off+t.n; off += d.unit {
			n := min(d.unit, t.off+t.n-off)
			if err := d.judge(ctx, off, p[off-t.off:][:n], t.again); err != nil {
				return err
			}
		}
		d.meter.add(t.n)
	}
}

// take returns what to read next, when the rate allows it; false if that is nothing.
func (d *diskAudit) take(ctx context.Context) (task, bool, error) {
	for {
		t, wait, ok := d.choose(time.Now())
		if err := sleep(ctx, wait); err != nil {
			return t, false, err
		}
		if ctx.Err() != nil {
			return t, false, ctx.Err()
		}
		if t.n > 0 || !ok {
			return t, ok, nil
		}
	}
}

// choose returns a task and how long to wait before it; a wait without a task if
// suspects have to ripen; false if all is done.
func (d *diskAudit) choose(now time.Time) (t task, wait time.Duration, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.proof != nil || d.out.Mismatched >= maxMismatches {
		return t, 0, false
	}
	if d.out.Early == "" && !d.until.IsZero() && now.After(d.until) && d.out.Sampled < d.want {
		d.out.Early = "its time was up"
	}
	switch {
	case len(d.suspects) > 0 && !now.Before(d.suspects[0].due):
		t = task{off: d.suspects[0].off, n: d.unit, again: true}
		d.suspects = d.suspects[1:]
	case d.out.Early == "" && d.out.Sampled < d.want:
		first, n := d.drawn()
		t = task{off: first * d.unit, n: n * d.unit}
		d.out.Sampled += n
	case len(d.suspects) > 0:
		return t, d.suspects[0].due.Sub(now), true
	default:
		return t, 0, false
	}
	t.n = min(t.n, d.dev.size-t.off)
	d.out.Read += t.n
	if d.Rate > 0 {
		wait = max(0, d.next.Sub(now))
		d.next = now.Add(wait + time.Duration(float64(t.n)/float64(d.Rate)*1e9))
	}
	return t, wait, true
}

// drawn returns granules that were not read yet: ascending if all are to be, else one by chance.
func (d *diskAudit) drawn() (first, n int64) {
	if d.All {
		return d.draw.run(readChunk / d.unit)
	}
	return d.draw.one(), 1
}

// judge compares a granule that was read. That it is not marked now, after reading, says
// that it was not written before: marks stay until the epoch is closed, which
// can't happen while the audit holds the device.
func (d *diskAudit) judge(ctx context.Context, off int64, p []byte, again bool) error {
	if d.src.Marked(off, int64(len(p))) {
		d.count(&d.out.Void)
		return nil
	}
	diff, err := d.compare(ctx, off, p)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case diff == nil && again:
		d.out.Unsteady++
	case diff == nil:
		u := off / d.unit
		d.good[u/64] |= 1 << (u % 64)
	case !again:
		d.suspects = append(d.suspects, suspect{off, time.Now().Add(d.settle)})
		if len(d.suspects) >= maxMismatches && d.out.Early == "" {
			d.out.Early = fmt.Sprintf("%d granules differ", len(d.suspects))
		}
	default:
		d.mismatch(Mismatch{Off: off, Len: int64(len(p)), Found: time.Now().UTC(), Grains: diff}, p)
	}
	return nil
}

func (d *diskAudit) count(n *int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	*n++
}

// mismatch records a granule that differed twice and is not marked, unless the tracker itself
// says by now that it may have missed something: then nothing was missed silently. The
// caller holds mu.
func (d *diskAudit) mismatch(m Mismatch, p []byte) {
	if d.out.Mismatched == 0 {
		if _, err := d.marks(); err != nil {
			if !errors.Is(err, cbt.ErrUnproven) {
				d.src.Distrust() // it could not be asked
			}
			d.proof = err
			return
		}
		// At once: nobody may take what is about to be found for whole, whatever becomes of this audit.
		d.src.Distrust()
	}
	d.out.Mismatched++
	if len(d.out.Mismatches) < maxKept {
		m.data = slices.Clone(p)
		d.out.Mismatches = append(d.out.Mismatches, m)
	}
}

// compare returns the grains of a granule that are not as in the point.
func (d *diskAudit) compare(ctx context.Context, off int64, p []byte) ([]GrainMismatch, error) {
	var out []GrainMismatch
	for i := int64(0); i < int64(len(p)); i += d.grain {
		b := p[i:min(i+d.grain, int64(len(p)))]
		ref, err := d.content.Lookup(ctx, (off+i)/d.grain)
		if err != nil {
			return nil, err
		}
		want, n := ref.Hash, int64(len(b))
		if n < d.grain {
			b = append(slices.Clone(b), make([]byte, d.grain-n)...)
		}
		if ref.IsZero() {
			want = d.Repo.HashGrain(make([]byte, d.grain))
		}
		if got := d.Repo.HashGrain(b); got != want {
			out = append(out, GrainMismatch{Off: off + i, Len: n, Point: want, Disk: got})
		}
	}
	return out, nil
}

// sum takes stock at the end: a granule that has been written since it was read
// is none of those that stayed unchanged, and so is no sample of them either.
func (d *diskAudit) sum(marks cbt.Bitmap, complete bool) {
	changed := widen(marks, d.unit)
	if len(changed) != len(d.good) {
		return // nothing was learned
	}
	d.out.Unchanged, d.out.Good = 0, 0
	for i, w := range changed {
		d.out.Unchanged += int64(bits.OnesCount64(^w))
		d.out.Good += int64(bits.OnesCount64(^w & d.good[i]))
	}
	d.out.Void = d.out.Sampled - d.out.Good - d.out.Mismatched - d.out.Unsteady - int64(len(d.suspects))
	if !complete || d.out.Mismatched+d.out.Unsteady > 0 || d.All && d.out.Good < d.out.Unchanged {
		return // an early end of --all is no sample: it has read from the front
	}
	d.out.Exact = d.out.Good == d.out.Unchanged
	d.out.Bound = bound(d.out.Unchanged, d.out.Good)
}

// alarm keeps the evidence of a mismatch, also if ctx has ended.
func (d *diskAudit) alarm(ctx context.Context) error {
	if d.out.Mismatched >= maxMismatches {
		d.out.Early = fmt.Sprintf("%d mismatches", d.out.Mismatched)
	}
	ctx = context.WithoutCancel(ctx)
	m := d.out.Mismatches[0]
	alarm := fmt.Errorf("%s: %w (granules: %d): at byte %d, length %d, BLAKE3 %s on the disk, %s in %s@%s",
		d.out.Path, ErrUnrecorded, d.out.Mismatched, m.Grains[0].Off, m.Grains[0].Len, m.Grains[0].Disk, m.Grains[0].Point, d.VM, d.point.ID)
	var err error
	if d.out.Trusted, err = d.trusted(ctx, d.disk.Name); err != nil {
		err = fmt.Errorf("find the points that may be wrong: %w", err)
	}
	dir, writeErr := d.keep()
	d.out.Evidence = dir
	if writeErr != nil {
		writeErr = fmt.Errorf("the evidence could not be kept: %w", writeErr)
	}
	return errors.Join(alarm, err, writeErr)
}
