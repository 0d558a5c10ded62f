package testvm

import (
	"strconv"
	"strings"
)

// Report is what a source VM's guest told about its disk.
type Report struct {
	Booted   bool
	Mode     string // "writer" or "show"
	Last     int    // newest file found at boot; -1 as long as it was not told
	Complete bool   // all files 1 to Last are there and whole
	Missing  []int  // numbers below Last that are not there, the first 100
	Bad      []int  // files that are damaged, the first 100
	Wrote    int    // newest file made durable since boot, 0 if none
	Full     bool   // no room for more files
}

// ParseConsole reads a source VM's console. Lines that are not the guest
// program's are skipped.
func ParseConsole(lines []Line) Report {
	r := Report{Last: -1}
	for _, l := range lines {
		// The kernel may print in between, but not within a line of ours.
		_, text, ok := strings.Cut(l.Text, "TIDEMARK-GUEST ")
		if !ok {
			continue
		}
		what, arg, _ := strings.Cut(text, " ")
		if what == "booted" {
			r.Booted, r.Mode = true, arg
			continue
		}
		n, err := strconv.Atoi(arg)
		if err != nil || n < 0 {
			continue
		}
		switch what {
		case "last":
			r.Last = n
		case "complete":
			r.Complete = n == r.Last
		case "missing":
			r.Missing = append(r.Missing, n)
		case "bad":
			r.Bad = append(r.Bad, n)
		case "wrote":
			r.Wrote = n
		case "full":
			r.Full = true
		}
	}
	return r
}
