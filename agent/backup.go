package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// Defaults of a Job.
const (
	DefaultPauseBudget = 100 * time.Millisecond
	maxRounds          = 12 // reads of changed extents before the guest is paused whatever they show
	maxPauses          = 5  // attempts at the last round
)

// Job is one backup of one VM.
type Job struct {
	VM      string
	Disks   []string // paths, in the order of the VM's disks
	Repo    *store.Repo
	Quiesce Quiesce

	// Source opens the changed-block source of a disk. The job closes it.
	Source func(ctx context.Context, path string) (cbt.Source, error)

	// PauseBudget is how long the guest may stand still; DefaultPauseBudget if 0.
	PauseBudget time.Duration

	// AllowInconsistent accepts a point that shows no single instant.
	AllowInconsistent bool

	// Limits are for this backup alone, Shared is what it shares with others; its own if nil.
	Limits Limits
	Shared *Pipeline

	// Checkpoint is how often it is noted how far the backup has come, so that the next one can go on
	// from there if this one is interrupted; DefaultCheckpoint if 0, never if negative.
	Checkpoint time.Duration

	// Grain in bytes for disks that have no point yet; store.DefaultGrain if 0.
	Grain int

	// Tool is the name and version written into the point.
	Tool string

	// Progress, if set, is called about ten times a second, not concurrently.
	Progress func(Progress)

	// Watchdog is the program and first arguments that run RunWatchdog; this
	// program's hidden subcommand if nil.
	Watchdog []string
}

// Progress is how far a job has come.
type Progress struct {
	Round       int
	Done, Total int64 // bytes of this round
	Phase       string
}

// Result is a backup that is durable.
type Result struct {
	Point  *store.Point  `json:"point"`
	Chosen string        `json:"chosen"` // how the instant was reached, and why that way
	Took   time.Duration `json:"took_ns"`
}

// ErrNoDisk is wrapped when a job names none.
var ErrNoDisk = errors.New("no disk to back up")

// disk is one disk while it is backed up.
type disk struct {
	*device
	name     string
	src      cbt.Source
	out      *store.DiskWriter
	at       cbt.ChangeID // everything up to here has been handed to out, or is in pending
	pending  cbt.Extents  // changed, not read yet
	written  written      // of pending
	grain    int64        // bytes
	read     int64        // bytes
	tracking store.Tracking
	unknown  []string // of the last advance
	evidence []cbt.Evidence
	writers  map[int]cbt.Writer // by process ID
	holders  map[int]string     // names of the processes that had the disk open for writing
}

// Run makes one restore point. If the last point's map is damaged, the whole disk is
// read and a new one begun. An error means that there is no point, and that the next run
// starts from the same one as this did, unless Result.Point is set.
func (j Job) Run(ctx context.Context) (Result, error) {
	if len(j.Disks) == 0 {
		return Result{}, ErrNoDisk
	}
	if j.PauseBudget <= 0 {
		j.PauseBudget = DefaultPauseBudget
	}
	if j.Shared == nil {
		j.Shared = NewPipeline(Limits{})
	}
	r, err := j.run(ctx, nil)
	if errors.Is(err, store.ErrCorrupt) && r.Point == nil {
		return j.run(ctx, err)
	}
	return r, err
}

// run makes a point; damage, if not nil, is why the last one can't be continued.
func (j Job) run(ctx context.Context, damage error) (_ Result, err error) {
	begin := time.Now()
	w, err := j.Repo.Begin(ctx, j.VM)
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, w.Abort()) }()

	disks, users, err := j.open(ctx, w, damage)
	defer func() {
		for _, d := range disks {
			err = errors.Join(err, d.close())
		}
	}()
	if err != nil {
		return Result{}, err
	}
	c, err := j.converge(ctx, disks, users, newCheckpoints(w, j.Checkpoint))
	if err != nil {
		return Result{}, err
	}
	p := store.Point{VM: j.VM, Time: c.instant.UTC(), Consistency: c.consistency, Quiesce: c.quiesce, Tool: j.Tool}
	for _, d := range disks {
		if d.tracking.Evidence, err = json.Marshal(d.evidence); err != nil {
			return Result{}, err
		}
		d.heldBy(d.writers)
		d.tracking.Writers = d.named(j.Quiesce.pid())
		p.Disks = append(p.Disks, store.Disk{
			Name: d.name, Source: d.path, ChangeID: d.at.String(), Tracking: d.tracking, Stats: store.Stats{Read: d.read},
		})
	}
	done, err := w.Commit(ctx, p)
	if err != nil {
		return Result{}, err
	}
	// The point stands. Epochs that can't be given up now are given up next time.
	for _, d := range disks {
		if !d.at.IsZero() {
			err = errors.Join(err, d.src.Commit(d.at))
		}
	}
	return Result{Point: done, Chosen: c.chosen, Took: time.Since(begin)}, err
}

func (d *disk) close() error {
	var err error
	if d.src != nil {
		err = d.src.Close()
	}
	return errors.Join(err, d.f.Close())
}

// open opens the disks, decides for each from where to count changes, and begins its first epoch.
// It finds out who uses them: while that is looked for in /proc, the kernel waits for grace periods.
func (j Job) open(ctx context.Context, w *store.Writer, damage error) ([]*disk, []user, error) {
	way := &lane{Pipeline: j.Shared, own: newThrottle(j.Limits)}
	var disks []*disk
	var left *store.Partial
	var lost string
	if damage == nil {
		var err error
		if left, lost, err = w.Unfinished(ctx); err != nil {
			return nil, nil, err
		}
	}
	for i, path := range j.Disks {
		dev, err := openDevice(path)
		if err != nil {
			return disks, nil, err
		}
		dev.lane = way
		d := &disk{device: dev, name: fmt.Sprintf("disk%d", i)}
		disks = append(disks, d)
		if d.src, err = j.Source(ctx, path); err != nil {
			return disks, nil, err
		}
		if lost != "" {
			d.tracking.Reasons = append(d.tracking.Reasons, "an interrupted backup can't be taken up: "+lost)
		}
		if err := j.begin(ctx, d, w, damage, left); err != nil {
			return disks, nil, err
		}
	}
	var users []user
	g, work := errgroup.WithContext(ctx)
	for _, d := range disks {
		// Nothing may be read before the epoch in which it could change is open.
		g.Go(func() error { return d.advance(work) })
	}
	g.Go(func() (err error) { users, err = usersOf(work, devices(disks)); return err })
	if err := g.Wait(); err != nil {
		return disks, nil, err
	}
	for i, d := range disks {
		if len(d.unknown) > 0 && !d.tracking.Resumed.IsZero() {
			d.tracking.Reasons = append(d.tracking.Reasons, "what changed since the checkpoint is not known: all of it was read again")
		}
		d.held(users, i)
	}
	return disks, users, nil
}

func devices(disks []*disk) []*device {
	out := make([]*device, len(disks))
	for i, d := range disks {
		out[i] = d.device
	}
	return out
}

// begin opens d's part of the point.
func (j Job) begin(ctx context.Context, d *disk, w *store.Writer, damage error, left *store.Partial) error {
	before := previous(w.Parent(), d.name)
	o := store.DiskOptions{Name: d.name, Source: d.path, Size: d.size, Grain: j.Grain, Dedup: true}
	if before != nil {
		if before.Root.Size > d.size {
			return fmt.Errorf("%s: %w: %d bytes, at the last point it had %d: back it up under another name, or give the disk its size back",
				d.path, ErrShrunk, d.size, before.Root.Size)
		}
		o.Grain = before.Root.Grain
		o.Dedup = before.Root.Size != d.size
	}
	if damage != nil {
		// Nor is anything in the repository trusted to be what its index says.
		o.Fresh, o.Dedup = true, false
		d.tracking.Reasons = append(d.tracking.Reasons, "the last point can't be continued: "+damage.Error())
	}
	for _, bad := range w.Unreadable() {
		d.tracking.Reasons = append(d.tracking.Reasons, "a newer point was passed over: "+bad.Error())
	}
	if p := left.Disk(d.name); d.fits(p, o.Grain) {
		o.Resume, o.Grain = p, p.Root.Grain
		d.takeUp(p, left.Time)
	}
	if o.Grain == 0 {
		o.Grain = store.DefaultGrain
	}
	d.grain = int64(o.Grain)
	var err error
	if d.out, err = w.Disk(ctx, o); err != nil {
		return err
	}
	d.readLost()
	if o.Resume != nil {
		return nil
	}
	d.tracking.Mode = "full"
	switch {
	case before == nil || !d.out.HasParent():
	case before.Root.Size != d.size:
		// What lies behind the old end was never read, whenever it was written.
		d.tracking.Mode = "compare"
		d.tracking.Reasons = append(d.tracking.Reasons, "the disk has grown since the last point")
	default:
		d.tracking.Mode = "tracked"
		if d.at, err = cbt.ParseChangeID(before.ChangeID); err != nil {
			d.tracking.Reasons = append(d.tracking.Reasons, "the last point's change ID can't be read")
		}
	}
	return nil
}

// readLost makes the backup read what the repository has lost of the last point, changed or not.
func (d *disk) readLost() {
	var lost cbt.Extents
	for _, c := range d.out.Lost() {
		lost = append(lost, cbt.Extent(c))
	}
	if len(lost) == 0 {
		return
	}
	d.pending = d.pending.Union(lost.Align(d.grain, d.size))
	d.tracking.Reasons = append(d.tracking.Reasons, fmt.Sprintf("%d bytes of the last point are lost in the repository: they were read again", lost.Bytes()))
}

// ErrShrunk is wrapped when a disk is smaller than its last point.
var ErrShrunk = errors.New("the disk has shrunk")

func previous(p *store.Point, name string) *store.Disk {
	if p == nil {
		return nil
	}
	for i := range p.Disks {
		if p.Disks[i].Name == name {
			return &p.Disks[i]
		}
	}
	return nil
}

// advance closes the disk's epoch and adds what changed in it to pending.
func (d *disk) advance(ctx context.Context) error {
	delta, err := d.src.Changes(ctx, d.at)
	if err != nil {
		return err
	}
	d.unknown = delta.Unknown
	if len(delta.Unknown) > 0 {
		switch d.tracking.Mode {
		case "tracked", "compare":
			d.tracking.Mode = "compare"
			d.tracking.Reasons = append(d.tracking.Reasons, delta.Unknown...)
		default:
			if len(d.evidence) > 0 {
				// A full backup needs no proof for its beginning, only for what came after.
				d.tracking.Reasons = append(d.tracking.Reasons, delta.Unknown...)
			}
		}
	}
	if err := d.same(delta.Evidence); err != nil {
		return fmt.Errorf("%s: %w: %w", d.path, cbt.ErrDeviceChanged, err)
	}
	d.at = delta.ID
	d.pending = d.pending.Union(delta.Extents.Align(d.grain, d.size))
	d.evidence = append(d.evidence, delta.Evidence)
	d.wrote(delta.Writers)
	return nil
}
