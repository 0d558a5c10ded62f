package main

import "testing"

func TestParseFio(t *testing.T) {
	const out = `fio: a note
{"jobs":[{"error":0,"read":{"bw_bytes":0,"total_ios":0,"io_bytes":0,"clat_ns":{}},
"write":{"bw_bytes":4096000,"total_ios":2000,"io_bytes":8192000,"clat_ns":{"percentile":{"50.000000":1000,"99.000000":52000}}}}]}`
	got, err := parseFio([]byte(out))
	if err != nil {
		t.Fatal(err)
	}
	if want := (result{ops: 2000, bytes: 8192000, rate: 4096000, p99: 52}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, bad := range []string{
		"", "{}", `{"jobs":[{"error":5,"read":{"bw_bytes":1,"total_ios":1}}]}`, `{"jobs":[{"error":0}]}`, `{"jobs":[{},{}]}`,
	} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
