package main

import (
	"testing"
	"time"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func TestParseFio(t *testing.T) {
	const good = "note: both iodepth >= 1 and synchronous I/O engine\n" +
		`{"fio version":"fio-3.33","jobs":[{"error":0,"read":{"iops":9.0,"total_ios":7},"write":{"iops":1234.5,"total_ios":2469}}]}`
	r, err := parseFio([]byte(good))
	if err != nil || r.iops != 1234.5 || r.writes != 2469 {
		t.Fatalf("got %+v, %v", r, err)
	}
	for _, bad := range []string{
		"", "{", `{"jobs":[]}`,
		`{"jobs":[{"error":5,"write":{"iops":1,"total_ios":1}}]}`,
		`{"jobs":[{"error":0,"write":{"iops":0,"total_ios":0}}]}`,
	} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestShares(t *testing.T) {
	r := run{writes: 1000, fio: time.Second, wall: 2 * time.Second, machine: measure.CPUTime{Busy: 3 * time.Second, Kernel: time.Second}}
	if got := r.perWrite(r.fio); got != 1000 {
		t.Errorf("%v µs per write", got)
	}
	if got := r.others(2); got != 0.25 {
		t.Errorf("others used %v", got)
	}
}
