package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/tidemark/tidemark/agent"
)

// How progress is shown: --progress.
const (
	progressAuto = "auto" // a line on a terminal, unless JSON or nothing is to be printed
	progressJSON = "json"
	progressNone = "none"
)

// progressFlag is the value of --progress.
type progressFlag string

func (f *progressFlag) String() string { return string(*f) }

func (f *progressFlag) Type() string { return "HOW" }

func (f *progressFlag) Set(s string) error {
	if known := []string{progressAuto, progressJSON, progressNone}; !slices.Contains(known, s) {
		return fmt.Errorf("it is %s", strings.Join(known, ", "))
	}
	*f = progressFlag(s)
	return nil
}

// How often progress is shown at most.
const (
	lineEvery = 50 * time.Millisecond
	jsonEvery = time.Second
)

// step is how far a command has come, as --progress=json says it: one object a line.
type step struct {
	Progress string  `json:"progress"` // what is being done
	Unit     string  `json:"unit"`     // "bytes", or "items" of what is counted
	Done     int64   `json:"done"`
	Total    int64   `json:"total"`           // 0 if it is not known
	Seconds  float64 `json:"seconds"`         // since this began
	Rate     float64 `json:"rate_per_second"` // on average
	ETA      float64 `json:"eta_seconds"`     // 0 if it is not known
}

// progress shows how far a command has come: it draws one line on a terminal, or writes lines
// of JSON. Not for concurrent use.
type progress struct {
	how   progressFlag // progressNone, progressJSON, or progressAuto for the line
	out   io.Writer
	now   func() time.Time
	what  string
	begin time.Time // of what is being done: when what was before it was last heard of
	heard time.Time
	last  time.Time // shown
	drawn bool
}

// progress is the command's: there is one, so that however many parts it has, it is not shown more
// often.
func (g *globals) progress() *progress {
	if g.bar == nil {
		how := g.show
		if how == progressAuto && (g.quiet || g.json || !term.IsTerminal(int(os.Stderr.Fd()))) {
			how = progressNone
		}
		g.bar = newProgress(how, os.Stderr, time.Now)
	}
	return g.bar
}

func newProgress(how progressFlag, out io.Writer, now func() time.Time) *progress {
	return &progress{how: how, out: out, now: now, heard: now()}
}

func (p *progress) bytes(what string, done, total int64) { p.show(what, "bytes", done, total) }

// count is for things that are counted; a total of 0 is not known.
func (p *progress) count(what string, done, total int64) { p.show(what, "items", done, total) }

func (p *progress) backup(a agent.Progress) {
	p.bytes(fmt.Sprintf("round %d, %s", a.Round, a.Phase), a.Done, a.Total)
}

func (p *progress) show(what, unit string, done, total int64) {
	if p.how == progressNone {
		return
	}
	now := p.now()
	if what != p.what {
		p.what, p.begin = what, p.heard
	}
	p.heard = now
	every := lineEvery
	if p.how == progressJSON {
		every = jsonEvery
	}
	if !p.last.IsZero() && now.Sub(p.last) < every {
		return
	}
	p.last = now
	s := step{Progress: what, Unit: unit, Done: done, Total: total, Seconds: now.Sub(p.begin).Seconds()}
	if s.Seconds > 0 {
		s.Rate = float64(done) / s.Seconds
	}
	if s.Rate > 0 && done < total {
		s.ETA = float64(total-done) / s.Rate
	}
	if p.how == progressJSON {
		_ = json.NewEncoder(p.out).Encode(s)
		return
	}
	p.drawn = true
	_, _ = fmt.Fprint(p.out, "\r\x1b[K"+s.line())
}

// line is the step for people.
func (s step) line() string {
	eta := ""
	if s.ETA > 0 {
		eta = " ETA " + time.Duration(s.ETA*1e9).Round(time.Second).String()
	}
	switch {
	case s.Unit == "bytes":
		percent := 100.0
		if s.Total > 0 {
			percent = 100 * float64(s.Done) / float64(s.Total)
		}
		return fmt.Sprintf("%s %5.1f%%  %s / %s  %s/s%s", s.Progress, percent, size(s.Done), size(s.Total), size(int64(s.Rate)), eta)
	case s.Total > 0:
		return fmt.Sprintf("%s: %d of %d%s", s.Progress, s.Done, s.Total, eta)
	}
	return fmt.Sprintf("%s: %d", s.Progress, s.Done)
}

// end clears the line.
func (p *progress) end() {
	if p.drawn {
		_, _ = fmt.Fprint(p.out, "\r\x1b[K")
	}
	p.drawn, p.what = false, ""
}
