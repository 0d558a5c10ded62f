package main

import (
	"errors"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidemark/tidemark/bpf"
)

// trackerMetrics tells what the tracker counted and lost, whenever it is asked.
type trackerMetrics struct{ pins string }

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName("tidemark", "tracker", name), help, labels, nil)
}

var (
	attachedDesc = describe("attached", "1 if the tracking programs are attached on this host.")
	missedDesc   = describe("missed_events_total", "Events that the kernel did not give to one copy of a program. Only what all copies of a program miss is lost.", "program", "copy")
	fileDesc     = describe("file_missed_events_total", "The same of the programs for image files.", "filesystem", "program", "copy")
	errorDesc    = describe("unreadable", "1 if a part of what the tracker knows could not be read: its other metrics are missing.")
	lostDesc     = describe("lost_events_total", "Events that could not be attributed to a device.", "what")
	writesDesc   = describe("writes_total", "Writes submitted to the device.", "device")
	bytesDesc    = describe("written_bytes_total", "Bytes submitted for writing.", "device")
	discardsDesc = describe("discarded_bytes_total", "Bytes discarded or zeroed.", "device")
	rewritesDesc = describe("rewritten_bytes_total", "Bytes written where all had been written in the same epoch.", "device")
	passDesc     = describe("passthrough_total", "Commands that bypassed the block layer's bios.", "device")
	dirtyDesc    = describe("dirty_bytes", "Marked as changed and not yet in a restore point.", "device")
	memoryDesc   = describe("bitmap_bytes", "Kernel memory of the device's bitmaps.", "device")
	unknownDesc  = describe("unknown", "1 if what changed on the device can't be proven: the next backup compares.", "device")
)

func (m trackerMetrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		attachedDesc, missedDesc, fileDesc, errorDesc, lostDesc, writesDesc, bytesDesc, discardsDesc, rewritesDesc, passDesc, dirtyDesc, memoryDesc, unknownDesc,
	} {
		out <- d
	}
}

func (m trackerMetrics) Collect(out chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	// An invalid metric would take all others with it.
	unreadable := false
	defer func() {
		n := 0.0
		if unreadable {
			n = 1
		}
		send(errorDesc, prometheus.GaugeValue, n)
	}()
	tr, err := bpf.Open(bpf.Options{Dir: m.pins, AdoptOnly: true})
	if err != nil {
		unreadable = !errors.Is(err, bpf.ErrNotAttached) || errors.Is(err, bpf.ErrUnusable)
		send(attachedDesc, prometheus.GaugeValue, 0)
		return
	}
	defer func() { _ = tr.Close() }()
	send(attachedDesc, prometheus.GaugeValue, 1)
	missed, err := tr.Misses()
	unreadable = err != nil
	if err == nil {
		names := bpf.ProgramNames()
		per := len(missed) / len(names)
		for i, n := range missed {
			if i%per >= tr.Copies() {
				continue // not attached
			}
			send(missedDesc, prometheus.CounterValue, float64(n), names[i/per], strconv.Itoa(i%per))
		}
	}
	files, err := tr.FileMisses()
	unreadable = unreadable || err != nil
	for _, f := range files {
		per := len(f.Missed) / len(f.Programs)
		for i, n := range f.Missed {
			send(fileDesc, prometheus.CounterValue, float64(n), f.FS, f.Programs[i/per], strconv.Itoa(i%per))
		}
	}
	for what, n := range tr.Lost() {
		send(lostDesc, prometheus.CounterValue, float64(n), what)
	}
	all, err := tr.Status()
	unreadable = unreadable || err != nil
	for _, s := range all {
		r := trackedRow(s)
		send(writesDesc, prometheus.CounterValue, float64(r.Writes), r.Number)
		send(bytesDesc, prometheus.CounterValue, float64(r.Bytes), r.Number)
		send(discardsDesc, prometheus.CounterValue, float64(s.Counts.DiscardSectors*512), r.Number)
		send(rewritesDesc, prometheus.CounterValue, float64(s.Counts.RewriteSectors*512), r.Number)
		send(passDesc, prometheus.CounterValue, float64(s.Counts.Passthrough), r.Number)
		send(dirtyDesc, prometheus.GaugeValue, float64(r.Dirty), r.Number)
		send(memoryDesc, prometheus.GaugeValue, float64(r.Memory), r.Number)
		unknown := 0.0
		if len(r.Unknown) > 0 {
			unknown = 1
		}
		send(unknownDesc, prometheus.GaugeValue, unknown, r.Number)
	}
}
