package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func (b *bench) report(w io.Writer, asJSON bool) error {
	if asJSON {
		return measure.WriteJSON(w, struct {
			Host   measure.Host   `json:"host"`
			Size   int64          `json:"size"`
			Filled string         `json:"filled"`
			Tools  []*tool        `json:"tools"`
			Copy   measure.Sample `json:"cp_seconds"`
		}{b.host, b.size, b.filled, b.tools, b.copied})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(t, "%s\n%d MiB: %s; medians of %d rounds; the page cache is dropped before each backup, restore and mount\n", b.host, b.size>>20, b.filled, b.rounds)
	for _, x := range b.tools {
		_, _ = fmt.Fprintf(t, "  %s: %s: %s\n", x.Name, x.Version, x.Command)
	}
	for _, x := range b.tools {
		if x.Problem != "" {
			_, _ = fmt.Fprintf(t, "WARNING: %s\n", x.Problem)
		}
	}
	own := b.tools[0]
	_, _ = fmt.Fprintln(t, "\nfull backup\ts (min–max)\tCPU s\ttidemark takes [95 %]\trepository MiB\ttidemark's is")
	for _, x := range b.tools {
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%.1f\t%s\n", x.Name, x.Backup, times(x.Backup.Ratio), float64(x.Stored)/(1<<20),
			against(x == own, float64(own.Stored)/float64(x.Stored)))
	}
	_, _ = fmt.Fprintln(t, "\nrestore to a file\ts (min–max)\tCPU s\ttidemark takes [95 %]\tidentical")
	for _, x := range b.tools {
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%t\n", x.Name, x.Restore, times(x.Restore.Ratio), x.Identical)
	}
	_, _ = fmt.Fprintf(t, "cp\t%s\t\t%s\t\n", span(b.copied), times(ratio(own.Restore.Seconds, b.copied)))
	_, _ = fmt.Fprintln(t, "\nrandom 4 KiB from a mount\treads/s (min–max)\tmedian µs\ttidemark does [95 %]")
	for _, x := range b.tools {
		_, _ = fmt.Fprintf(t, "%s\t%s\t%.0f\t%s\n", x.Name, span(x.Reads.PerSecond), x.Reads.MedianUS.Median(), times(x.Reads.Ratio))
	}
	return t.Flush()
}

func (c costs) String() string {
	return fmt.Sprintf("%s\t%.1f", span(c.Seconds), c.CPUSeconds.Median())
}

func span(s measure.Sample) string {
	return fmt.Sprintf("%.1f (%.1f–%.1f)", s.Median(), s.Min(), s.Max())
}

func times(r *measure.Interval) string {
	if r == nil {
		return "1"
	}
	return r.String()
}

func against(own bool, v float64) string {
	if own {
		return "1"
	}
	return fmt.Sprintf("%.3f ×", v)
}
