package mainjob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// Options of Run.
type Options struct {
	Binary       string        // the tidemark command
	Dir          string        // scratch space, some hundreds of MB
	Out          io.Writer     // the story, for a person
	Incrementals int           // after the full
	DiskSize     int64         // bytes
	PauseBudget  time.Duration // of each backup
}

// Row is one restore point of the report.
type Row struct {
	ID, Mode              string
	Changed, Read, Stored int64 // bytes
	Paused                time.Duration
	Rounds                int
	Wrote                 int // newest file that the guest had reported durable at the point's instant
	Limit                 int // newest file that can have been on the disk then
}

// Boot is a standby that was booted.
type Boot struct {
	Point  string
	Last   int    // newest file it found
	Line   string // of its console, which says so
	Whole  bool   // all files up to Last are there and undamaged
	Booted time.Duration
}

// Report is what happened.
type Report struct {
	Rows   []Row
	Boots  []Boot // of the newest point, and of the first
	Hashes int    // points whose mounted disk hashed the same as the restored file
	Source int    // newest file of the source at the end: it went on
}

// VM is the name that the job gives its source.
const VM = "source"

type job struct {
	Options
	repo   string
	dev    string
	qmp    string
	kernel *testvm.Kernel
	source *testvm.VM
	clean  []func() error
}

// Run does the main job. The report is good only if the error is nil.
func Run(ctx context.Context, o Options) (_ Report, err error) {
	j := &job{Options: o, repo: filepath.Join(o.Dir, "repository"), qmp: filepath.Join(o.Dir, "qmp")}
	defer func() {
		for i := len(j.clean) - 1; i >= 0; i-- {
			err = errors.Join(err, j.clean[i]())
		}
	}()
	var r Report
	if err := j.startSource(ctx); err != nil {
		return r, err
	}
	if err := j.backups(ctx, &r); err != nil {
		return r, err
	}
	if err := j.files(ctx, &r); err != nil {
		return r, err
	}
	if err := j.standbys(ctx, &r); err != nil {
		return r, err
	}
	j.say("The source goes on")
	line, err := j.source.WaitWrote(ctx, j.source.Report().Wrote+1)
	if err != nil {
		return r, fmt.Errorf("the source did not go on: %w", err)
	}
	j.tell("source> %s", line.Text)
	r.Source = j.source.Report().Wrote
	return r, nil
}

func (j *job) say(format string, a ...any)  { _, _ = fmt.Fprintf(j.Out, "\n==> "+format+"\n", a...) }
func (j *job) tell(format string, a ...any) { _, _ = fmt.Fprintf(j.Out, "    "+format+"\n", a...) }

func (j *job) later(f func() error) { j.clean = append(j.clean, f) }

func (j *job) startSource(ctx context.Context) error {
	j.say("Source VM: Debian's cloud kernel on a host block device")
	var err error
	if j.kernel, err = testvm.FetchKernel(ctx, testvm.KernelSource{}); err != nil {
		return err
	}
	accel, err := testvm.Accel(ctx, j.kernel)
	if err != nil {
		return err
	}
	img := filepath.Join(j.Dir, "source.img")
	if err := testvm.BuildImage(ctx, img, j.DiskSize, testvm.ImageOptions{Files: map[string]string{"/etc/motd": motd}}); err != nil {
		return err
	}
	dev, detach, err := testvm.AttachLoop(ctx, img, testvm.LoopOptions{})
	if err != nil {
		return err
	}
	j.later(detach)
	j.dev = dev
	j.source, err = testvm.Start(ctx, testvm.Config{
		Name: VM, Kernel: j.kernel, Accel: accel, Disk: testvm.Drive{Device: dev}, Mode: testvm.Writer, PauseMs: 20, Load: true, QMPSocket: j.qmp,
	})
	if err != nil {
		return err
	}
	j.later(j.source.Stop)
	line, err := j.source.WaitWrote(ctx, 3)
	if err != nil {
		return err
	}
	j.tell("kernel %s (%s), disk %s, writing files without end", j.kernel.Release, accel, dev)
	j.tell("source> %s", line.Text)
	return nil
}

const motd = "a file that every point holds\n"

func (j *job) backups(ctx context.Context, r *Report) error {
	j.say("Track %s and make restore points while the guest writes", j.dev)
	if _, err := j.tidemark(ctx, "init"); err != nil {
		return err
	}
	out, err := j.tidemark(ctx, "track", j.dev)
	if err != nil {
		return err
	}
	j.later(func() error {
		_, err := j.tidemark(context.WithoutCancel(ctx), "untrack", j.dev, "--quiet")
		return err
	})
	j.tell("%s", strings.TrimSpace(string(out)))
	for i := range j.Incrementals + 1 {
		if _, err := j.source.WaitWrote(ctx, j.source.Report().Wrote+5); err != nil {
			return err
		}
		var got struct {
			Point  point  `json:"point"`
			Chosen string `json:"chosen"`
		}
		if err := j.tidemarkJSON(ctx, &got, "backup", VM, "--disk", j.dev, "--pause-budget", j.PauseBudget.String()); err != nil {
			return err
		}
		if i == 0 {
			j.tell("quiesce: %s", got.Chosen)
		}
		row, err := j.row(ctx, got.Point)
		if err != nil {
			return err
		}
		r.Rows = append(r.Rows, row)
		j.tell("point %s  %-8s read %s, stored %s, paused %v; the guest had written file %d", row.ID, row.Mode, mib(row.Read), mib(row.Stored),
			row.Paused.Round(time.Millisecond), row.Wrote)
		if want := "tracked"; i > 0 && row.Mode != want {
			return fmt.Errorf("point %s is %s, want %s: %v", row.ID, row.Mode, want, got.Point.Disks[0].Tracking.Reasons)
		}
		if got.Point.Consistency != "crash" {
			return fmt.Errorf("point %s is of consistency %q", row.ID, got.Point.Consistency)
		}
	}
	return nil
}

// row bounds what the point must hold by what the guest printed around its instant.
func (j *job) row(ctx context.Context, p point) (Row, error) {
	d := p.Disks[0]
	r := Row{
		ID: p.ID, Mode: d.Tracking.Mode, Changed: d.Stats.Changed, Read: d.Stats.Read, Stored: d.Stats.Stored,
		Paused: p.Quiesce.Paused, Rounds: p.Quiesce.Rounds,
	}
	var before []testvm.Line
	for _, l := range j.source.Console() {
		if l.Time.Before(p.Time) {
			before = append(before, l)
		}
	}
	r.Wrote = testvm.ParseConsole(before).Wrote
	// The next file may have been on the disk and not printed yet, and a line
	// may be read a little after it was printed.
	r.Limit = r.Wrote + 2
	if _, err := j.source.WaitWrote(ctx, r.Wrote+1); err != nil {
		return r, fmt.Errorf("the guest does not write after the pause: %w", err)
	}
	return r, nil
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func (j *job) standbys(ctx context.Context, r *Report) error {
	newest, first := r.Rows[len(r.Rows)-1], r.Rows[0]
	for i, row := range []Row{newest, first} {
		ref := VM + "@latest"
		if i > 0 {
			ref = VM + "@" + row.ID
		}
		j.say("Standby boots from the NBD export of %s, on an overlay", ref)
		b, err := j.boot(ctx, ref, filepath.Join(j.Dir, fmt.Sprintf("standby%d", i)))
		if err != nil {
			return err
		}
		b.Point = row.ID
		j.tell("standby> %s", b.Line)
		j.tell("booted in %v; the source had written file %d at that instant", b.Booted.Round(100*time.Millisecond), row.Wrote)
		if !b.Whole {
			return fmt.Errorf("the standby of %s found damaged or missing files", ref)
		}
		if b.Last < row.Wrote || b.Last > row.Limit {
			return fmt.Errorf("the standby of %s found file %d as the last, want %d to %d", ref, b.Last, row.Wrote, row.Limit)
		}
		r.Boots = append(r.Boots, b)
	}
	if r.Boots[0].Last <= r.Boots[1].Last {
		return fmt.Errorf("the newest point shows file %d, the first %d", r.Boots[0].Last, r.Boots[1].Last)
	}
	return nil
}

func (j *job) boot(ctx context.Context, ref, base string) (b Boot, err error) {
	stop, err := j.export(ctx, ref, base+".sock", base+".overlay")
	if err != nil {
		return b, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	begin := time.Now()
	vm, err := testvm.Start(ctx, testvm.Config{Name: "standby", Kernel: j.kernel, Disk: testvm.Drive{NBD: base + ".sock"}, Mode: testvm.Show})
	if err != nil {
		return b, err
	}
	defer vm.Kill()
	if err := vm.Wait(ctx); err != nil {
		return b, fmt.Errorf("standby: %w", err)
	}
	rep := vm.Report()
	b.Last, b.Whole, b.Booted = rep.Last, rep.Complete && len(rep.Bad) == 0, time.Since(begin)
	want := fmt.Sprintf("TIDEMARK-GUEST last %d", rep.Last)
	for _, l := range vm.Console() {
		if strings.HasPrefix(l.Text, want) {
			b.Line = l.Text
		}
	}
	return b, nil
}

// Print writes the table that the demo ends with.
func (r Report) Print(w io.Writer) {
	p := func(format string, a ...any) { _, _ = fmt.Fprintf(w, format+"\n", a...) }
	p("")
	p("%-18s %-8s %10s %10s %10s %8s %7s %s", "POINT", "MODE", "CHANGED", "READ", "STORED", "PAUSED", "ROUNDS", "GUEST HAD WRITTEN")
	for _, x := range r.Rows {
		p("%-18s %-8s %10s %10s %10s %8s %7d file %d", x.ID, x.Mode, mib(x.Changed), mib(x.Read), mib(x.Stored),
			x.Paused.Round(time.Millisecond), x.Rounds, x.Wrote)
	}
	p("")
	for _, b := range r.Boots {
		p("standby of %s: %q, all files whole, up in %v", b.Point, b.Line, b.Booted.Round(100*time.Millisecond))
	}
	p("mounted disk0.raw = restored file (SHA-256) for %d of %d points", r.Hashes, len(r.Rows))
	p("the source never stopped: it is at file %d", r.Source)
}
