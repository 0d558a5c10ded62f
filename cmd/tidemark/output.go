package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tidemark/tidemark/agent"
)

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// say prints what was done, or its JSON.
func (g *globals) say(c *cobra.Command, v any, format string, a ...any) error {
	if g.json {
		return printJSON(c.OutOrStdout(), v)
	}
	if g.quiet {
		return nil
	}
	_, err := fmt.Fprintf(c.OutOrStdout(), format+"\n", a...)
	return err
}

// table prints aligned columns.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer, head ...string) *table {
	t := &table{tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)}
	t.row(head...)
	return t
}

func (t *table) row(cells ...string) { _, _ = fmt.Fprintln(t.w, strings.Join(cells, "\t")) }

func (t *table) flush() error { return t.w.Flush() }

func size(n int64) string {
	if n < 0 {
		return "-" + humanize.IBytes(uint64(-n))
	}
	return humanize.IBytes(uint64(n))
}

func clock(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

func short(d time.Duration) string {
	switch {
	case d == 0:
		return "0"
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}

// progress draws one line on a terminal, and nothing elsewhere.
type progress struct {
	begin time.Time
	last  time.Time // drawn, by count
	drawn bool
	on    bool
}

func (g *globals) progress() *progress {
	return &progress{begin: time.Now(), on: !g.quiet && !g.json && term.IsTerminal(int(os.Stderr.Fd()))}
}

func (p *progress) bytes(what string, done, total int64) {
	if !p.on {
		return
	}
	p.drawn = true
	percent := 100.0
	if total > 0 {
		percent = 100 * float64(done) / float64(total)
	}
	rate := float64(done) / max(time.Since(p.begin).Seconds(), 0.001)
	eta := ""
	if left := total - done; left > 0 && rate > 0 && done > 0 {
		eta = " ETA " + time.Duration(float64(left)/rate*1e9).Round(time.Second).String()
	}
	fmt.Fprintf(os.Stderr, "\r\x1b[K%s %5.1f%%  %s / %s  %s/s%s", what, percent, size(done), size(total), size(int64(rate)), eta)
}

func (p *progress) backup(a agent.Progress) {
	if a.Done == 0 {
		p.begin = time.Now() // a new round
	}
	p.bytes(fmt.Sprintf("round %d, %s", a.Round, a.Phase), a.Done, a.Total)
}

// end clears the line.
func (p *progress) end() {
	if p.drawn {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}
