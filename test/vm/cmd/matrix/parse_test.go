package main

import (
	"strings"
	"testing"
)

const goodLog = `[    1.000000] brd: module loaded
TIDEMARK-RUN ABC start 1
FOR       CHECK                STATE    NOTE
tracking  kernel               ok       6.12.117+deb12-cloud-amd64
mount     fusermount3          absent   only root can mount
TIDEMARK-RUN ABC exit 1 0
=== RUN   TestTruth
=== RUN   TestTruth/loop
    truth_test.go:77: TRUTH rounds=1 epochs=14 writes=2983 trims=71 zeroes=20 written=29MiB submitted=42MiB deltas=145MiB missed=0 unknown=0 took=15s
=== RUN   TestTruth/dm-crypt
    kinds_dm_test.go:99: cipher aes-xts-plain64
    truth_test.go:77: TRUTH rounds=1 epochs=8 writes=7 trims=0 zeroes=1 written=1MiB submitted=1MiB deltas=1MiB missed=0 unknown=0 took=15s
=== RUN   TestTruth/md-linear
    kinds_test.go:81: SKIP: no md linear in this kernel (make matrix runs it under other kernels)
=== RUN   TestTruth/md-raid0
    kinds_test.go:92: REFUSED /dev/md100: writes to it can't be seen by block tracepoints: md raid0 passes writes on to its members
--- PASS: TestTruth (101.00s)
    --- PASS: TestTruth/loop (18.00s)
    --- PASS: TestTruth/dm-crypt (18.00s)
    --- SKIP: TestTruth/md-linear (0.00s)
    --- PASS: TestTruth/md-raid0 (1.00s)
PASS
=== RUN   TestUnknownFirst
--- PASS: TestUnknownFirst (0.42s)
=== RUN   TestOther
    x_test.go:9: SKIP: no such thing
--- SKIP: TestOther (0.00s)
PASS
`

func parsed(log string, exits ...int) result {
	r := result{kernel: "bookworm/linux-image-cloud-amd64", release: "6.12.117+deb12-cloud-amd64", exits: exits}
	r.parse(strings.Split(log, "\n"))
	return r
}

func TestParse(t *testing.T) {
	r := parsed(goodLog, 0, 0, 0)
	if r.failed() {
		t.Error("nothing failed: ", r.summary())
	}
	if len(r.kinds) != 4 || len(r.tests) != 2 {
		t.Fatalf("%d kinds, %d tests, want 4 and 2: %+v", len(r.kinds), len(r.tests), r)
	}
	for i, want := range []struct{ name, says, grid, note string }{
		{"loop", "ok", "ok 2983/14", ""},
		{"dm-crypt", "ok", "ok 7/8", ""},
		{"md-linear", "skip", "skip", "no md linear in this kernel"},
		{"md-raid0", "refused", "refused", "md raid0 passes writes on"},
	} {
		c := r.kinds[i]
		if c.name != want.name || c.says() != want.says || r.grid(want.name) != want.grid || !strings.Contains(c.note, want.note) || want.note == "" && c.note != "" {
			t.Errorf("got %q %q %q %q, want %+v", c.name, c.says(), r.grid(c.name), c.note, want)
		}
	}
	table := render([]result{r})
	for _, want := range []string{"6.12.117+deb12-cloud", "ok 2983/14", "2 passed"} {
		if want == "2 passed" {
			want = "3 passed, 1 refused, 2 skipped, 0 failed"
		}
		if !strings.Contains(table, want) {
			t.Errorf("the table has no %q:\n%s", want, table)
		}
	}
}

func TestParseFindsFailures(t *testing.T) {
	begun, _, _ := strings.Cut(goodLog, "=== RUN   TestTruth/md-linear")
	for name, c := range map[string]struct {
		log   string
		exits []int
		want  string // in the table
	}{
		"missed":        {strings.ReplaceAll(strings.Replace(goodLog, "missed=0", "missed=3", 1), "--- PASS: TestTruth/loop", "--- FAIL: TestTruth/loop"), []int{0, 1, 0}, "MISSED 3"},
		"unknown":       {strings.ReplaceAll(strings.Replace(goodLog, "unknown=0", "unknown=2", 1), "--- PASS: TestTruth/loop", "--- FAIL: TestTruth/loop"), []int{0, 1, 0}, "UNKNOWN 2"},
		"a broken test": {strings.Replace(goodLog, "    --- PASS: TestTruth/md-raid0", "    kinds_test.go:9: got nothing, want refused\n    --- FAIL: TestTruth/md-raid0", 1), []int{0, 1, 0}, "FAIL"},
		"cut short":     {begun, []int{0}, "UNFINISHED"},
		"other":         {strings.Replace(goodLog, "--- PASS: TestUnknownFirst", "--- FAIL: TestUnknownFirst", 1), []int{0, 0, 1}, "FAIL TestUnknownFirst"},
		// A program that crashes after its last test.
		"exit":         {goodLog, []int{0, 0, 2}, "ok"},
		"no exit":      {"", nil, "-"},
		"doctor fails": {goodLog, []int{3, 0, 0}, "exit 3"},
	} {
		t.Run(name, func(t *testing.T) {
			r := parsed(c.log, c.exits...)
			if table := render([]result{r}); !r.failed() || !strings.Contains(table, c.want) {
				t.Errorf("failed: %v; the table has no %q:\n%s", r.failed(), c.want, table)
			}
		})
	}
}

func TestOldKernelMustBeRefused(t *testing.T) {
	log := "tracking  kernel               missing  too old: 5.17 is the oldest\ntracking  privilege            ok       root\n=== RUN   TestOldKernelIsRefused\n--- PASS: TestOldKernelIsRefused (0.01s)\n"
	r := parsed(log, 3, 0)
	r.release = "5.10.0-46-cloud-amd64"
	if r.failed() || r.doctor != "kernel: too old: 5.17 is the oldest" {
		t.Errorf("failed %v, doctor says %q", r.failed(), r.doctor)
	}
	r.exits[0] = 0
	if !r.failed() {
		t.Error("doctor let an old kernel pass, and nothing failed")
	}
}

func TestParseKernel(t *testing.T) {
	for spec, want := range map[string]string{"sid/linux-image-7.2-cloud-amd64": "sid linux-image-7.2-cloud-amd64", "linux-image-rt-amd64": "bookworm linux-image-rt-amd64", "/x": "", "sid/": ""} {
		got, err := parseKernel(spec)
		if s := strings.TrimSpace(got.Suite + " " + got.Package); s != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v; want %q", spec, s, err, want)
		}
	}
}

func TestReadLog(t *testing.T) {
	r := readLog("a-kernel", "TIDEMARK-RUN X kernel 6.1.0-56-amd64 up 3.2\r\n"+goodLog+"TIDEMARK-RUN X exit 2 0\r\nTIDEMARK-RUN X exit 3 0\r\n")
	if r.release != "6.1.0-56-amd64" || len(r.exits) != 3 || !r.failed() || len(r.kinds) != 4 {
		t.Errorf("a log without its end: %+v", r)
	}
}
