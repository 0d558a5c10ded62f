package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// reads says where what is read of the disk comes from.
func (b *bench) reads() string {
	if b.cached {
		return "the disk's file is in the page cache"
	}
	return "the disk is read from " + b.where
}

func (b *bench) report(w io.Writer, asJSON bool) error {
	if asJSON {
		return measure.WriteJSON(w, struct {
			Host    measure.Host `json:"host"`
			Size    int64        `json:"size"`
			Percent float64      `json:"percent"`
			Reads   string       `json:"reads"`
			Tools   []*tool      `json:"tools"`
		}{b.host, b.size, b.percent, b.reads(), b.tools})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(t, "%s\n%d MiB with files from %s; %g %% changed in random granules of 64 KiB; medians of %d rounds; %s\n",
		b.host, b.size>>20, b.from, b.percent, b.rounds, b.reads())
	for _, x := range b.tools {
		_, _ = fmt.Fprintf(t, "  %s: %s: %s\n", x.Name, x.Version, x.Command)
	}
	for _, x := range b.tools {
		if x.Problem != "" {
			_, _ = fmt.Fprintf(t, "WARNING: %s\n", x.Problem)
		}
	}
	_, _ = fmt.Fprintln(t, "\ntool\tincremental s (min–max)\ttimes tracked [95 %]\tCPU s\tread MiB\tstored MiB\tfull s\tCPU s\tstored MiB\tverified")
	for _, x := range b.tools {
		ratio := "1"
		if x.Ratio != nil {
			ratio = fmt.Sprintf("%.1f [%.1f, %.1f]", x.Ratio.Value, x.Ratio.Low, x.Ratio.High)
		}
		_, _ = fmt.Fprintf(t, "%s\t%.3f (%.3f–%.3f)\t%s\t%.3f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%d\n", x.Name,
			x.Seconds.Median(), x.Seconds.Min(), x.Seconds.Max(), ratio, x.CPUSeconds.Median(),
			x.Read.Median()/(1<<20), x.Stored.Median()/(1<<20),
			x.Full.Seconds, x.Full.CPUSeconds, float64(x.Full.Stored)/(1<<20), x.Verified)
	}
	return t.Flush()
}
