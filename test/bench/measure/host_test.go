package measure

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	c, err := parseStat("cpu  100 20 30 9000 500 4 5 7 0 0\ncpu0 1 2 3\n")
	if err != nil || c.Busy != 1590*time.Millisecond || c.Stolen != 70*time.Millisecond {
		t.Fatalf("got %+v, %v", c, err)
	}
	for _, bad := range []string{"", "cpu 1 2", "intr 1 2 3 4 5 6 7 8 9", "cpu a 2 3 4 5 6 7 8"} {
		if _, err := parseStat(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestParseTaskWithAnyName(t *testing.T) {
	parent, used, err := parseTask("77 (kworker/u8:1-loop) 2) I 2 0 0 0 -1 69238880 0 0 0 0 3 40 0 0 20 0 1 0")
	if err != nil || parent != 2 || used != 430*time.Millisecond {
		t.Fatalf("got %d, %v, %v", parent, used, err)
	}
	for _, bad := range []string{"", "1 (x) S 2", "1 (x) S a 0 0 0 -1 0 0 0 0 0 3 40", "1 (x) S 1 0 0 0 -1 0 0 0 0 0 3 x"} {
		if _, _, err := parseTask(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestReadCPUOfThisMachine(t *testing.T) {
	before, err := ReadCPU()
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(100 * time.Millisecond); time.Now().Before(end); {
	}
	after, err := ReadCPU()
	if err != nil {
		t.Fatal(err)
	}
	if d := after.Sub(before); d.Busy < 30*time.Millisecond || d.Kernel < 0 || after.Kernel == 0 {
		t.Fatalf("100 ms of work show as %+v, kernel threads so far %v", d, after.Kernel)
	}
}

func TestBusyMachineIsRefusedOrCriedAbout(t *testing.T) {
	h, err := ThisHost()
	if err != nil || h.Kernel == "" || h.CPUs < 1 || h.Memory < 1<<20 {
		t.Fatalf("got %+v, %v", h, err)
	}
	h.Load, h.Busy = 9, true
	var out bytes.Buffer
	if err := h.Quiet(false, &out); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v", err)
	}
	if err := h.Quiet(true, &out); err != nil || !strings.HasPrefix(out.String(), "WARNING") {
		t.Errorf("got %v, %q", err, out.String())
	}
	if !strings.Contains(h.String(), "NOT QUIET") {
		t.Error(h)
	}
	if h.Busy = false; h.Quiet(false, &out) != nil {
		t.Error("a quiet machine was refused")
	}
}

func TestParseLoadAndModel(t *testing.T) {
	if v, err := parseLoad("1.25 0.5 0.3 2/100 77\n"); err != nil || v != 1.25 {
		t.Errorf("got %v, %v", v, err)
	}
	if _, err := parseLoad(""); err == nil {
		t.Error("an empty file was taken")
	}
	if m := cpuModel("processor\t: 0\nmodel name\t: Some CPU: fast\n"); m != "Some CPU: fast" {
		t.Errorf("got %q", m)
	}
}
