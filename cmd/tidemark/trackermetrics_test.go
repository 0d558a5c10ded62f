package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidemark/tidemark/bpf"
)

// scrape gathers the metrics of the tracker at pins, by name and labels.
func scrape(t *testing.T, pins string) map[string]float64 {
	t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(trackerMetrics{pins})
	all, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range all {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "tidemark_tracker_")
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			out[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return out
}

// loopDevice attaches a loop device of size bytes.
func loopDevice(t *testing.T, size int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--show", "-f", file).Output()
	if err != nil {
		t.Fatal("losetup: ", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev).Run() })
	return dev
}

// A device whose pins are damaged keeps no other one from being watched.
func TestMetricsOfADamagedTracker(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIP: needs root")
	}
	pins := fmt.Sprintf("/sys/fs/bpf/tidemark-metrics-%d", os.Getpid())
	t.Cleanup(func() {
		if err := bpf.Remove(pins); err != nil {
			t.Error(err)
		}
	})
	if m := scrape(t, pins); m["attached"] != 0 || m["unreadable"] != 0 {
		t.Errorf("no tracker: %v", m)
	}
	tr, err := bpf.Open(bpf.Options{Dir: pins})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tr.Close() }()
	var numbers []string
	for range 2 {
		d, err := bpf.Lookup(loopDevice(t, 4<<20))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tr.Register(d, bpf.DefaultGranuleShift); err != nil {
			t.Fatal(err)
		}
		numbers = append(numbers, d.Number())
	}
	m := scrape(t, pins)
	if m["attached"] != 1 || m["unreadable"] != 0 {
		t.Errorf("a good tracker: %v", m)
	}
	for _, n := range numbers {
		if m["bitmap_bytes "+n] == 0 {
			t.Errorf("%s has no bitmap: %v", n, m)
		}
	}

	bad, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1, Flags: 1 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = bad.Close() }()
	if err := bad.Pin(filepath.Join(pins, "dev-0", "e000000000000ffff")); err != nil {
		t.Fatal(err)
	}
	m = scrape(t, pins)
	if m["attached"] != 1 || m["unreadable"] != 1 {
		t.Errorf("one device is damaged: %v", m)
	}
	if _, ok := m["bitmap_bytes "+numbers[0]]; ok {
		t.Error("the damaged one has metrics")
	}
	if m["bitmap_bytes "+numbers[1]] == 0 {
		t.Errorf("the other one has none: %v", m)
	}
	if st, err := statusOf(pins); err == nil || len(st.Tracked) != 1 {
		t.Errorf("status: %+v, %v", st, err)
	}
}
