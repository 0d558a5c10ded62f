package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func (b *bench) report(w io.Writer, asJSON bool) error {
	if asJSON {
		return measure.WriteJSON(w, struct {
			Host    measure.Host `json:"host"`
			Size    int64        `json:"size"`
			Filled  string       `json:"filled"`
			Seconds int          `json:"seconds"`
			Tables  []*table     `json:"tables"`
		}{b.host, b.size, b.filled, b.seconds, b.tables})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(t, "%s\n%d MiB: %s; medians of %d rounds of %d s; unix sockets; processor time is the server's\n",
		b.host, b.size>>20, b.filled, b.rounds, b.seconds)
	for _, x := range b.tables {
		for _, s := range x.Servers {
			_, _ = fmt.Fprintf(t, "  %s: %s: %s\n", s.Name, s.Version, s.Command)
		}
	}
	for _, x := range b.tables {
		_, _ = fmt.Fprintf(t, "\n%s\tserver\trate (min–max)\tp99 µs\tCPU µs/request\tCPU s/GiB\t%s does [95 %%]\tits p99 is\tits CPU is\n", x.Name, x.Servers[0].Name)
		for _, r := range x.Rows {
			for i, c := range r.Cells {
				_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%.1f\t%.2f\t%s\t%s\t%s\n", r.Name, x.Servers[i].Name, r.rate(c), number(c.P99), c.CPU.Median(),
					c.GiB.Median(), times(c.RateRatio), times(c.P99Ratio), times(c.CPURatio))
			}
		}
	}
	return t.Flush()
}

// rate is requests per second where they are at random, else bytes.
func (r *row) rate(c *cell) string {
	s, scale, unit := c.Rate, 1e6, "MB/s"
	if strings.HasPrefix(r.way, "rand") {
		s, scale, unit = c.Ops, 1e3, "kIOPS"
	}
	return fmt.Sprintf("%.1f (%.1f–%.1f) %s", s.Median()/scale, s.Min()/scale, s.Max()/scale, unit)
}

func number(s measure.Sample) string {
	if len(s) == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f", s.Median())
}

func times(r *measure.Interval) string {
	if r == nil {
		return ""
	}
	return r.String()
}
