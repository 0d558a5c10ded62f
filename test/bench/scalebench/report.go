package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
)

// spent is the bytes of a repository by kind.
type spent struct {
	objects             int
	packs, points, rest int64
}

func (o options) measureRepo(ctx context.Context) (s spent, err error) {
	b, err := o.meter(ctx)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	for info, err := range b.List(ctx, "") {
		if err != nil {
			return s, err
		}
		s.objects++
		switch {
		case len(info.Name) > 6 && info.Name[:6] == "packs/":
			s.packs += info.Size
		case len(info.Name) > 7 && info.Name[:7] == "points/":
			s.points += info.Size
		default:
			s.rest += info.Size
		}
	}
	return s, nil
}

func bench(ctx context.Context, o options) error {
	fmt.Printf("a disk of %s with %s of data in %d areas; %d points of %d random grains of %s; %d incompressible bytes in each\n\n",
		bytes(o.Size), bytes(o.dataGrains()*grain), o.Areas, o.Points, o.Changes, bytes(grain), o.Stored)
	var full, incremental written
	fullUsed, err := o.runPhase(ctx, "full", 0, &full)
	if err != nil {
		return err
	}
	first, err := o.measureRepo(ctx)
	if err != nil {
		return err
	}
	incrUsed, err := o.runPhase(ctx, "incremental", 0, &incremental)
	if err != nil {
		return err
	}
	all, err := o.measureRepo(ctx)
	if err != nil {
		return err
	}

	t := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	row := func(format string, args ...any) { _, _ = fmt.Fprintf(t, format+"\n", args...) }
	row("writing\tpoints\tgrains\tmedian of a point\tprocessor time\tpeak memory")
	row("first point\t1\t%d\t%.1f s\t%.1f s\t%s", full.Changed, full.Median, fullUsed.cpu.Seconds(), bytes(fullUsed.peak))
	row("others\t%d\t%d\t%.3f s\t%.1f s\t%s", incremental.Points, incremental.Changed, incremental.Median, incrUsed.cpu.Seconds(), bytes(incrUsed.peak))
	row("")
	// Of the content, only what does not compress is stored: some bytes more.
	meta := func(s, less spent, grains int64) int64 {
		return s.packs + s.points - less.packs - less.points - grains*int64(o.Stored)
	}
	m := meta(all, first, incremental.Changed)
	row("metadata\tper point\tper changed grain")
	row("first point\t%s\t%d bytes", bytes(meta(first, spent{}, full.Changed)), meta(first, spent{}, full.Changed)/max(full.Changed, 1))
	row("others\t%s\t%d bytes", bytes(m/int64(max(incremental.Points, 1))), m/max(incremental.Changed, 1))
	row("objects\t%d", all.objects)
	row("")
	row("reading\topen\t\t\tfirst 4 KiB, all cold\t\t\trandom 4 KiB, early\t\t\trandom 4 KiB, steady\t\t\t\tpeak memory")
	row("point\trequests\tKiB\tms\trequests\tKiB\tms\trequests\tKiB\tµs\trequests\tKiB\tµs\t99 %%, µs\t")
	for _, point := range []int{0, o.Points / 2, o.Points - 1} {
		var r reading
		u, err := o.runPhase(ctx, "read", point, &r)
		if err != nil {
			return err
		}
		if r.Wrong > 0 {
			return fmt.Errorf("point %d: %d reads gave other bytes than were written", point, r.Wrong)
		}
		row("%d\t%.0f\t%.0f\t%.1f\t%.1f\t%.0f\t%.1f\t%.2f\t%.1f\t%.0f\t%.2f\t%.1f\t%.0f\t%.0f\t%s", point+1,
			r.Open.Requests, r.Open.Bytes/1024, r.Open.Median/1000,
			r.First.Requests, r.First.Bytes/1024, r.First.Median/1000,
			r.Early.Requests, r.Early.Bytes/1024, r.Early.Median,
			r.Steady.Requests, r.Steady.Bytes/1024, r.Steady.Median, r.Steady.P99, bytes(u.peak))
	}
	row("")
	row("garbage collection\tpoints\tmap nodes\trequests\tread\tputs\tdeletes\tpacks deleted\tcompacted\tfreed\tseconds\tprocessor time\tpeak memory\tfirst marking\tlook at packs")
	gc := func(what string) error {
		var c collected
		u, err := o.runPhase(ctx, "gc", 0, &c)
		if err != nil {
			return err
		}
		row("%s\t%d\t%d\t%d\t%s\t%d\t%d\t%d\t%d\t%s\t%.1f\t%.1f s\t%s\t%d requests, %.1f s\t%d requests, %.1f s", what, c.Report.Points, c.Report.Nodes, c.Requests, bytes(c.Read),
			c.Writes, c.Deletes, c.Report.Deleted, c.Report.Compacted, bytes(c.Report.Freed), c.Seconds, u.cpu.Seconds(), bytes(u.peak),
			c.Marking.Requests, c.Marking.Seconds, c.Choosing.Requests, c.Choosing.Seconds)
		return nil
	}
	if err := gc("nothing to do"); err != nil {
		return err
	}
	var forgotten int
	if _, err := o.runPhase(ctx, "forget", 0, &forgotten); err != nil {
		return err
	}
	if err := gc(fmt.Sprintf("%d forgotten", forgotten)); err != nil {
		return err
	}
	if err := gc("and again"); err != nil {
		return err
	}
	return t.Flush()
}

func bytes(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
