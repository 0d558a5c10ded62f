package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

var (
	releaseLine = regexp.MustCompile(`TIDEMARK-RUN \S+ kernel (\S+) up `)
	exitLine    = regexp.MustCompile(`TIDEMARK-RUN \S+ exit \d+ (\d+)`)
	doneLine    = regexp.MustCompile(`TIDEMARK-RUN \S+ done `)
)

// readLogs reads what former runs have left, sorted by release.
func readLogs(dir string) ([]result, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil {
		return nil, err
	}
	var all []result
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		all = append(all, readLog(strings.TrimSuffix(filepath.Base(f), ".log"), string(b)))
	}
	slices.SortFunc(all, func(a, b result) int { return slices.Compare(numbers(a.release), numbers(b.release)) })
	return all, nil
}

func readLog(name, text string) result {
	r := result{kernel: name}
	lines := strings.Split(strings.ReplaceAll(text, "\r", ""), "\n")
	done := false
	for _, l := range lines {
		if m := releaseLine.FindStringSubmatch(l); m != nil {
			r.release = m[1]
		}
		if m := exitLine.FindStringSubmatch(l); m != nil {
			status, _ := strconv.Atoi(m[1])
			r.exits = append(r.exits, status)
		}
		done = done || doneLine.MatchString(l)
	}
	if !done {
		r.broken = "the guest ended without a result"
	}
	r.parse(lines)
	return r
}

// numbers makes 6.12 come after 6.1.
func numbers(release string) []int {
	var all []int
	for f := range strings.FieldsFuncSeq(release, func(c rune) bool { return c < '0' || c > '9' }) {
		n, _ := strconv.Atoi(f)
		all = append(all, n)
	}
	return all
}
