package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// result is what one kernel's tests said.
type result struct {
	kernel  string // as asked for
	release string
	absent  string   // why the kernel could not be fetched
	broken  string   // why the run has no end
	missing []string // modules that the kernel has not
	exits   []int    // of the programs, in order; that of doctor comes first
	doctor  string   // why it says that tracking is not possible
	kinds   []cell   // in the order of the test
	tests   []cell   // all other tests
}

// cell is the result of one test.
type cell struct {
	name    string
	verdict string // "PASS", "FAIL", "SKIP", "REFUSED", or "" for one that did not end
	note    string // why, if it did not pass
	numbers map[string]string
}

const truthPrefix = "TestTruth/"

var (
	ranLine     = regexp.MustCompile(`=== (?:RUN|CONT|NAME) +(\S+)$`)
	verdictLine = regexp.MustCompile(`--- (PASS|FAIL|SKIP): (\S+) \([0-9.]+s\)`)
	saidLine    = regexp.MustCompile(`^\s*\w+_test\.go:\d+: (.*)$`)
	doctorLine  = regexp.MustCompile(`^tracking\s{2,}(.*?)\s{2,}missing\s{2,}(.*)$`)
)

// parse reads the verbose output of the test binaries, and doctor's table.
func (r *result) parse(log []string) {
	var order []string
	cells := map[string]*cell{}
	at := func(name string) *cell {
		if cells[name] == nil {
			cells[name] = &cell{name: name}
			order = append(order, name)
		}
		return cells[name]
	}
	var now *cell
	for _, line := range log {
		if m := doctorLine.FindStringSubmatch(line); m != nil && r.doctor == "" {
			r.doctor = m[1] + ": " + m[2]
		}
		if m := ranLine.FindStringSubmatch(line); m != nil {
			now = at(m[1])
			continue
		}
		if m := verdictLine.FindStringSubmatch(line); m != nil {
			c := at(m[2])
			if c.verdict == "" || m[1] == "FAIL" {
				c.verdict = m[1]
			}
			continue
		}
		m := saidLine.FindStringSubmatch(line)
		if m == nil || now == nil {
			continue
		}
		now.said(m[1])
	}
	for _, name := range order {
		c := *cells[name]
		if c.note != "" && c.verdict == "PASS" {
			if why, ok := strings.CutPrefix(c.note, "REFUSED"); ok {
				c.verdict, c.note = "REFUSED", strings.TrimSpace(why)
			} else {
				c.note = ""
			}
		}
		kind, ok := strings.CutPrefix(name, truthPrefix)
		switch {
		case ok:
			c.name = kind
			r.kinds = append(r.kinds, c)
		case name != strings.TrimSuffix(truthPrefix, "/"):
			r.tests = append(r.tests, c)
		}
	}
}

// said takes in one line that a test logged.
func (c *cell) said(text string) {
	if rest, ok := strings.CutPrefix(text, "TRUTH "); ok {
		c.numbers = map[string]string{}
		for f := range strings.FieldsSeq(rest) {
			if k, v, ok := strings.Cut(f, "="); ok {
				c.numbers[k] = v
			}
		}
		return
	}
	if strings.HasPrefix(text, "cipher ") {
		return
	}
	// The first complaint tells most.
	if c.note == "" || strings.HasPrefix(text, "SKIP:") || strings.HasPrefix(text, "MISSED") && !strings.HasPrefix(c.note, "MISSED") {
		c.note = strings.TrimPrefix(text, "SKIP: ")
	}
}

// failed tells whether the run shows that something is wrong.
func (r *result) failed() bool {
	if r.absent != "" {
		return false
	}
	bad := func(c cell) bool { return c.verdict == "FAIL" || c.verdict == "" }
	if r.broken != "" || len(r.exits) == 0 || slices.ContainsFunc(r.kinds, bad) || slices.ContainsFunc(r.tests, bad) {
		return true
	}
	// Under a kernel that is too old doctor must refuse, under all others it must not.
	if want := map[bool]int{true: 3}[tooOld(r.release)]; r.exits[0] != want {
		return true
	}
	return slices.ContainsFunc(r.exits[1:], func(status int) bool { return status != 0 })
}

// summary is one line for a person who waits.
func (r *result) summary() string {
	if r.absent != "" {
		return r.kernel + ": not to be had: " + r.absent
	}
	count := map[string]int{}
	for _, c := range slices.Concat(r.kinds, r.tests) {
		count[c.verdict]++
	}
	s := fmt.Sprintf("%s (%s): %d passed, %d refused, %d skipped, %d failed, %d unfinished", r.kernel, r.release, count["PASS"], count["REFUSED"], count["SKIP"], count["FAIL"], count[""])
	if r.doctor != "" {
		s += "; doctor says " + r.doctor
	}
	if r.broken != "" {
		s += "; " + r.broken
	}
	return s
}
