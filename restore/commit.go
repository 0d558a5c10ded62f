package restore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/tidemark/tidemark/store"
)

// CommittedMode is how the disks of a committed point were read, in place of a tracker's word.
const CommittedMode = "overlay"

// OverlayBase says what an overlay was made for.
type OverlayBase struct {
	Repository string // its ID
	VM, Point  string
	Disk       int // of the point, counted from 0
}

// ReadOverlayBase reads the header of an overlay, without opening it. The errors are those of [OpenOverlay].
func ReadOverlayBase(path string) (OverlayBase, error) {
	fail := func(err error) (OverlayBase, error) { return OverlayBase{}, fmt.Errorf("overlay %s: %w", path, err) }
	shape, err := readOverlayShape(path)
	if err != nil {
		return fail(err)
	}
	parts := strings.Split(shape.identity, "/")
	if len(parts) != 4 {
		return fail(fmt.Errorf("made for %q: %w", shape.identity, ErrOverlayBase))
	}
	disk, err := strconv.Atoi(parts[3])
	if err != nil || disk < 0 {
		return fail(fmt.Errorf("made for %q: %w", shape.identity, ErrOverlayBase))
	}
	return OverlayBase{parts[0], parts[1], parts[2], disk}, nil
}

// CommitOptions say what a committed point is called and told.
type CommitOptions struct {
	Time     time.Time // of the last write; moved behind the VM's newest point
	Tool     string
	Progress func(done, total int64) // bytes of what is read; may be nil
}

// Commit makes a restore point of what is written in overlays over the disks of p, by the number of the disk; a disk
// without one stays as it is. Only grains are read in which something was written. The overlays must not be
// written to meanwhile.
//
// What is known to be lost of p must be written over, else the error wraps [ErrCorrupt]: the new point would be as
// damaged, and not known to be.
//
// The point's parent is p, also if the VM has newer points; it becomes the VM's newest. It shows the overlays at one
// instant, so it is as consistent as a disk after a power failure, unless p was not.
// The next backup of the VM's own disks compares them.
func (c *Catalog) Commit(ctx context.Context, p *PointDetails, overlays map[int]*Overlay, o CommitOptions) (_ *store.Point, err error) {
	w, err := c.repo.BeginFrom(ctx, p.PointInfo)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Abort()) }()
	made := store.Point{
		VM: p.VM, Time: o.Time, Consistency: store.Crash, Quiesce: store.Quiesce{Method: CommittedMode}, Config: p.Config, Tool: o.Tool,
	}
	if p.Consistency == string(store.None) {
		made.Consistency = store.None
	}
	jobs := make([]commitJob, len(p.Disks))
	var total int64
	for i, d := range p.Disks {
		out, err := w.Disk(ctx, store.DiskOptions{Name: d.Name, Source: d.Source, Size: d.Size, Grain: d.Grain})
		if err != nil {
			return nil, err
		}
		jobs[i] = commitJob{from: overlays[i], out: out, grain: int64(d.Grain), size: d.Size}
		if jobs[i].from != nil {
			if err := jobs[i].find(); err != nil {
				return nil, err
			}
		}
		if n := jobs[i].inherited(out.Lost()); n > 0 {
			return nil, fmt.Errorf("commit %s: %w: %d bytes of %s are lost in the repository and not written over: see repair", d.Name, ErrCorrupt, n, p.ID)
		}
		for _, r := range jobs[i].runs {
			total += r.Len
		}
	}
	var done int64
	for i, d := range p.Disks {
		if err := jobs[i].copy(ctx, func(n int64) {
			done += n
			if o.Progress != nil {
				o.Progress(done, total)
			}
		}); err != nil {
			return nil, fmt.Errorf("commit %s: %w", d.Name, err)
		}
		made.Disks = append(made.Disks, store.Disk{
			Name: d.Name, Source: d.Source,
			Tracking: store.Tracking{Mode: CommittedMode, Reasons: []string{"what a VM that was booted from " + p.ID + " has written"}},
			Stats:    store.Stats{Read: jobs[i].read},
		})
	}
	return w.Commit(ctx, made)
}

// commitJob brings one overlay into a new point.
type commitJob struct {
	from        *Overlay
	out         *store.DiskWriter
	grain, size int64
	runs        []Extent // of whole grains, ascending
	read        int64
}

// find lists the grains in which something was written.
func (j *commitJob) find() error {
	add := func(off, n int64) {
		from := off / j.grain * j.grain
		to := min((off+n+j.grain-1)/j.grain*j.grain, j.size)
		if n := len(j.runs); n > 0 {
			last := &j.runs[n-1]
			from = max(from, last.Off+last.Len)
			if from >= to {
				return
			}
		}
		j.runs = appendRun(j.runs, Extent{Off: from, Len: to - from})
	}
	return j.from.changedRuns(func(e Extent) error {
		add(e.Off, e.Len)
		return nil
	})
}

// inherited is how much of what is lost, in bytes, lies outside of what is written.
func (j *commitJob) inherited(lost []store.Covered) (n int64) {
	for _, c := range lost {
		n += c.Len
		for _, r := range j.runs {
			n -= max(0, min(r.Off+r.Len, c.Off+c.Len)-max(r.Off, c.Off))
		}
	}
	return n
}

func (j *commitJob) copy(ctx context.Context, done func(n int64)) error {
	if j.from == nil {
		return nil
	}
	buf := make([]byte, copyPiece)
	for _, r := range j.runs {
		for r.Len > 0 {
			p := buf[:min(r.Len, copyPiece)]
			if n, err := j.from.ReadAtContext(ctx, p, r.Off); n < len(p) {
				return noEOF(err)
			}
			if err := j.out.Write(ctx, r.Off, p); err != nil {
				return err
			}
			j.read += int64(len(p))
			done(int64(len(p)))
			r.Off, r.Len = r.Off+int64(len(p)), r.Len-int64(len(p))
		}
	}
	return nil
}
