package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func (b *bench) report(w io.Writer, cells []*cell, asJSON bool) error {
	if asJSON {
		return measure.WriteJSON(w, struct {
			Host  measure.Host `json:"host"`
			Notes []string     `json:"notes"`
			Cells []*cell      `json:"cells"`
		}{b.host, b.notes, cells})
	}
	var s strings.Builder
	fmt.Fprintf(&s, "%s\n", b.host)
	for _, n := range b.notes {
		fmt.Fprintf(&s, "NOTE: %s\n", n)
	}
	fmt.Fprintf(&s, "fio 4 KiB random writes, direct, seed %d; medians of %d rounds; granule, era block and chunk %d KiB\n", b.seed, b.rounds, granule>>10)
	for _, l := range b.layers {
		fmt.Fprintf(&s, "  %s: %s\n", l.name, l.what)
	}
	if _, err := io.WriteString(w, s.String()); err != nil {
		return err
	}
	for _, c := range cells {
		if err := c.report(w); err != nil {
			return err
		}
	}
	return nil
}

func (c *cell) report(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(t, "\n%s (%d MiB), %s, %d writes a run\n", c.Device, c.Bytes>>20, c.Load, c.Writes)
	_, _ = fmt.Fprintln(t, "layer\tkIOPS (min–max)\tIOPS against none [95 %]\tCPU µs/write: fio\tkernel threads\tmachine\tagainst none [95 %]\tothers")
	for _, r := range c.Layers {
		if r.Refused != "" {
			_, _ = fmt.Fprintf(t, "%s\tnot measured: %s\n", r.Layer, r.Refused)
			continue
		}
		_, _ = fmt.Fprintf(t, "%s\t%.1f (%.1f–%.1f)\t%s\t%.2f\t%.2f\t%.2f\t%s\t%.0f %%\n", r.Layer,
			r.IOPS.Median()/1e3, r.IOPS.Min()/1e3, r.IOPS.Max()/1e3, interval(r.IOPSRatio),
			r.Fio.Median(), r.Kernel.Median(), r.Machine.Median(), interval(r.MachineRatio), 100*r.Others.Median())
	}
	for _, r := range c.Layers {
		if len(r.Programs) > 0 {
			_, _ = fmt.Fprintf(t, "%s, with BPF statistics: ns per event (runs per write), for each copy\n", r.Layer)
			lines, total := programLines(r.Programs)
			for _, l := range lines {
				_, _ = fmt.Fprintln(t, "  "+l)
			}
			_, _ = fmt.Fprintf(t, "  all programs\t%.0f ns per write\n", total)
		}
	}
	return t.Flush()
}

func interval(i *measure.Interval) string {
	if i == nil {
		return "1"
	}
	return fmt.Sprintf("%.3f [%.3f, %.3f]", i.Value, i.Low, i.High)
}

// programLines has one line per program with all its copies, which stand next to each other, in
// medians over the rounds; total is the time that all of them took for one write, in ns.
func programLines(rounds [][]program) (lines []string, total float64) {
	last := ""
	for i := range rounds[0] {
		var ns, runs, both measure.Sample
		for _, r := range rounds {
			ns, runs, both = append(ns, r[i].NsPerEvent), append(runs, r[i].RunsPerWrite), append(both, r[i].NsPerEvent*r[i].RunsPerWrite)
		}
		total += both.Median()
		name := rounds[0][i].Name
		if k := strings.LastIndexByte(name, '_'); k > 0 {
			name = name[:k]
		}
		if name != last {
			lines, last = append(lines, name), name
		}
		lines[len(lines)-1] += fmt.Sprintf("\t%.0f (%.2f)", ns.Median(), runs.Median())
	}
	return lines, total
}
