package main

import (
	"errors"
	"regexp"
	"strconv"
	"strings"
)

// result is what a search found.
type result struct {
	states   uint64
	depth    uint64
	complete bool   // every state within the bounds was visited
	why      string // why not
	failed   bool   // an assertion was
	violated string // the property, such as "P1"
	trace    []step
}

// step is one line of a trace.
type step struct{ who, what string }

var (
	statesLine = regexp.MustCompile(`(?m)^\s*(\d+) states, stored`)
	depthLine  = regexp.MustCompile(`depth reached (\d+), errors: (\d+)`)
)

// cutShort are the words of a pan whose search did not visit all.
var cutShort = []string{"Search not completed", "max search depth too small", "out of memory", "reached -DMEMLIM", "truncated", "hash conflicts unresolved"}

// parseSearch reads what pan printed.
func parseSearch(out string) (result, error) {
	var r result
	s, d := statesLine.FindStringSubmatch(out), depthLine.FindStringSubmatch(out)
	if s == nil || d == nil || !strings.Contains(out, "Full statespace search for") && !strings.Contains(out, "Using Breadth-First Search") {
		return r, errors.New("pan's output can't be read: " + out)
	}
	r.states, _ = strconv.ParseUint(s[1], 10, 64)
	r.depth, _ = strconv.ParseUint(d[1], 10, 64)
	r.failed = d[2] != "0"
	r.complete = !r.failed
	for _, w := range cutShort {
		if strings.Contains(out, w) {
			r.complete, r.why = false, w
		}
	}
	return r, nil
}

// parseTrace reads what Spin printed of a trail: lines "who|what" of the model's
// printf, and among them "P1|violated: ...".
func parseTrace(out string) ([]step, string) {
	var steps []step
	violated := ""
	for line := range strings.Lines(out) {
		who, what, ok := strings.Cut(strings.TrimSpace(line), "|")
		if !ok {
			continue
		}
		steps = append(steps, step{who, what})
		if strings.HasPrefix(what, "violated: ") {
			violated = who
		}
	}
	return steps, violated
}
