package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestProgressAsJSON shows ten updates a second for five seconds of one thing, then many short ones.
func TestProgressAsJSON(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1764000000, 0)
	p := newProgress(progressJSON, &out, func() time.Time { return now })
	for i := range 51 {
		p.bytes("round 1, reading", int64(i)*100, 10_000)
		now = now.Add(100 * time.Millisecond)
	}
	p.end()
	for i := range 20 { // short parts of one command
		p.count(fmt.Sprint("part ", i), 1, 0)
		p.end()
		now = now.Add(100 * time.Millisecond)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 8 {
		t.Fatalf("%d lines in 7.1 seconds:\n%s", len(lines), &out)
	}
	var s step
	if err := json.Unmarshal([]byte(lines[4]), &s); err != nil {
		t.Fatal(err)
	}
	want := step{Progress: "round 1, reading", Unit: "bytes", Done: 4000, Total: 10_000, Seconds: 4, Rate: 1000, ETA: 6}
	if s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
	var last step
	if err := json.Unmarshal([]byte(lines[7]), &last); err != nil {
		t.Fatal(err)
	}
	if last.Unit != "items" || last.Done != 1 || last.Total != 0 || last.ETA != 0 || last.Seconds != 0.1 {
		t.Errorf("got %+v: it counts on from what was before it", last)
	}
}

func TestProgressOnATerminal(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1764000000, 0)
	p := newProgress(progressAuto, &out, func() time.Time { return now })
	p.bytes("restoring", 0, 100<<20)
	now = now.Add(time.Second)
	p.bytes("restoring", 25<<20, 100<<20)
	p.end()
	want := "\r\x1b[Krestoring   0.0%  0 B / 100 MiB  0 B/s" +
		"\r\x1b[Krestoring  25.0%  25 MiB / 100 MiB  25 MiB/s ETA 3s" + "\r\x1b[K"
	if out.String() != want {
		t.Errorf("got %q, want %q", &out, want)
	}
}
