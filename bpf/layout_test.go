package bpf

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"testing"
)

// What kernel and userspace must agree on stands in two files.
func TestLayoutMatchesHeader(t *testing.T) {
	src, err := os.ReadFile("layout.h")
	if err != nil {
		t.Fatal(err)
	}
	header := map[string]uint64{}
	for _, m := range regexp.MustCompile(`(?m)^#define (\w+) (?:\(1 << (\d+)\)|(\d+))`).FindAllStringSubmatch(string(src), -1) {
		n, _ := strconv.ParseUint(m[2]+m[3], 10, 64)
		if m[2] != "" {
			n = 1 << n
		}
		header[m[1]] = n
	}
	for name, want := range map[string]uint64{
		"LAYOUT_VERSION": layoutVersion, "MAX_DEVICES": maxDevices, "MAX_INFLIGHT": maxInflight, "INFLIGHT_PROBES": inflightProbes, "MAX_DISCARDS": maxDiscards, "COPIES": copies,
		"HEADER_WORDS": headerWords, "HDR_TAINT": hdrTaint, "HDR_NUMBER": hdrNumber, "HOST_WORDS": hostWords, "HOST_WRITERS": hostWriters, "HOST_NVME_OPS": hostNVMeOps,
		"PLACES": places, "PROBES": probes, "PLACE_FREE": placeFree, "PLACE_GONE": placeGone, "MAX_WRITERS": maxWriters, "HEAT_REGIONS": heatRegions,
		"BROKEN_NO_SUBMIT": uint64(BrokenNoSubmit), "BROKEN_NO_COMPLETE": uint64(BrokenNoComplete), "BROKEN_BLIND": uint64(BrokenBlind),
		"HOST_NO_EPOCH": hostNoEpoch, "HOST_PASSTHROUGH": hostPassthrough,
		"TAINT_RANGE": uint64(TaintRange), "TAINT_BITMAP": uint64(TaintBitmap), "TAINT_INFLIGHT": uint64(TaintInflight),
		"TAINT_PASSTHROUGH": uint64(TaintPassthrough), "TAINT_OPCODE": uint64(TaintOpcode), "TAINT_DISCARDS": uint64(TaintDiscards), "TAINT_UNSEEN": uint64(TaintUnseen),
		"TAINT_IOCTL": uint64(TaintIoctl), "TAINT_UNMOUNT": uint64(TaintUnmount), "TAINT_FOLIO": uint64(TaintFolio),
		"BROKEN_NO_WRITEBACK": uint64(BrokenNoWriteback), "BROKEN_NO_DIRECT": uint64(BrokenNoDirect),
		"TAINT_AUDIT": uint64(TaintAudit),
		"MAX_CALLS":   maxCalls, "CALL_PROBES": callProbes, "CALL_WORDS": callWords, "CALLS_UNNOTED": callsUnnoted, "CALLS_BEFORE": callsBefore, "CALLS_RESCUED": callsRescued,
		"CALL_QUEUE": uint64(slices.Index(programs, "bio_queue")), "CALL_RQ_COMPLETE": uint64(slices.Index(programs, "rq_complete")),
		"CALL_BIO_COMPLETE": uint64(slices.Index(programs, "bio_complete")),
	} {
		if got, ok := header[name]; !ok || got != want {
			t.Errorf("%s is %d in layout.h, %d in layout.go", name, got, want)
		}
		delete(header, name)
	}
	for name := range header {
		t.Errorf("%s stands in layout.h alone", name)
	}
}

// The embedded object has the maps and programs that are looked up by name.
func TestObjectHoldsWhatIsNamed(t *testing.T) {
	spec, err := loadTracker()
	if err != nil {
		t.Fatal(err)
	}
	for i := range len(programs) * copies {
		if spec.Programs[programName(i)] == nil {
			t.Error("no program ", programName(i))
		}
	}
	for name := range new(Tracker).mapNames() {
		if spec.Maps[name] == nil {
			t.Error("no map ", name)
		}
	}
	if n := spec.Maps["devices"].ValueSize; n != 8*placeWords {
		t.Errorf("a place has %d bytes", n)
	}
	if n := spec.Maps["counts"].MaxEntries; n != maxDevices {
		t.Errorf("counts has %d entries", n)
	}
}

// Every bit has words of its own, and one that this program doesn't know is not swallowed.
func TestEveryReasonIsSaid(t *testing.T) {
	for bit := range 8 {
		if got := Loss(1 << bit).Reasons(); len(got) != 1 || got[0] == "an unknown loss" {
			t.Errorf("loss %d: %q", bit, got)
		}
	}
	for bit := range 7 {
		if got := Taint(1 << bit).Reasons(); len(got) != 1 || got[0] == "an unknown taint" {
			t.Errorf("taint %d: %q", bit, got)
		}
	}
	if got := fmt.Sprint(Taint(1<<40).Reasons(), Loss(1<<40).Reasons()); got != "[an unknown taint] [an unknown loss]" {
		t.Error(got)
	}
}
