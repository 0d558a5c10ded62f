package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/store"
)

// writerList names writers in one line, the first few of them.
func writerList(ws []store.WrittenBy, most int) string {
	var out []string
	for i, w := range ws {
		if i == most {
			out = append(out, fmt.Sprintf("and %d more", len(ws)-most))
			break
		}
		name := w.Comm
		if w.PID != 0 {
			name = fmt.Sprintf("%s (pid %d)", w.Comm, w.PID)
		}
		out = append(out, name+" "+size(int64(max(w.Bytes, w.Dirtied))))
	}
	return strings.Join(out, ", ")
}

// printEvidence shows what a point's completeness rests on: its no-miss certificate.
func printEvidence(w io.Writer, p *store.Point) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s@%s  %s  %s\n", p.VM, p.ID, clock(p.Time), p.Consistency)
	for _, d := range p.Disks {
		if err := diskEvidence(&b, d); err != nil {
			return fmt.Errorf("%s@%s: evidence of %s: %w", p.VM, p.ID, d.Name, err)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func diskEvidence(b *strings.Builder, d store.Disk) error {
	line := func(what, format string, args ...any) {
		fmt.Fprintf(b, "    %-16s %s\n", what, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(b, "  %s  %s  %s\n", d.Name, d.Source, d.Tracking.Mode)
	evidence, err := parseEvidence(d.Tracking.Evidence)
	if err != nil {
		return err
	}
	sum := sumEvidence(evidence)
	switch {
	case d.Tracking.Mode == "tracked" && sum.SavedState != "":
		line("verdict", "tracking was complete, if nobody else wrote while the host was down")
	case d.Tracking.Mode == "tracked":
		line("verdict", "tracking was complete: no write was missed")
	case d.Tracking.Mode == restore.CommittedMode:
		line("verdict", "all that was written to an overlay of the parent was read: nothing else can differ")
	case d.Tracking.Mode == "compare":
		line("verdict", "tracking could not be proven complete: the whole disk was compared")
	default:
		line("verdict", "the whole disk was read")
	}
	for _, why := range d.Tracking.Reasons {
		line("because", "%s", why)
	}
	if len(evidence) == 0 {
		line("evidence", "none")
		return nil
	}
	line("method", "%s", sum.Method)
	if sum.Method != "none" {
		printSum(line, sum)
	}
	for _, w := range d.Tracking.Writers {
		line("written by", "%s (pid %d, %s): %d writes, %s, %s through the page cache", w.Comm, w.PID, w.Role, w.Writes, size(int64(w.Bytes)), size(int64(w.Dirtied)))
	}
	return nil
}

func printSum(line func(what, format string, args ...any), e cbt.Evidence) {
	if e.Method == cbt.MethodFile {
		line("file", "inode %d of %s on %s (device %s), handle %s, %s, granule %s", e.Inode, e.FileSystem, e.Mount, e.Device, e.Handle, size(e.Size), size(e.Granule))
	} else {
		line("device", "%s, %s, diskseq %d, granule %s", e.Device, size(e.Size), e.DiskSeq, size(e.Granule))
	}
	line("epochs", "%d to %d, %s to %s", e.FirstEpoch, e.LastEpoch, stamp(e.Opened), stamp(e.Closed))
	line("attached", "%s, boot %s, links %s", stamp(e.Attached), e.BootID, strings.Trim(fmt.Sprint(e.LinkIDs), "[]"))
	if e.SavedState != "" {
		line("saved state", "%s", e.SavedState)
	}
	if e.Earlier {
		line("before", "other programs marked a part of it, and missed nothing either")
	}
	for i, n := range e.LeastMisses {
		name := fmt.Sprint(i)
		if i < len(e.Programs) {
			name = e.Programs[i]
		}
		line("missed", "%d events in every copy of %s", n, name)
	}
	line("sectors", "%d submitted, %d completed", e.Sectors, e.Landed)
	if e.KernelSectors != nil {
		line("kernel's count", "%d sectors", *e.KernelSectors)
	} else if e.Method != cbt.MethodFile {
		line("kernel's count", "not kept (queue/iostats is off)")
	}
	line("marked", "%d granules, %s", e.Dirty, size(int64(e.Dirty)*e.Granule))
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "?"
	}
	return t.Local().Format("2006-01-02 15:04:05.000")
}

func parseEvidence(b json.RawMessage) ([]cbt.Evidence, error) {
	var out []cbt.Evidence
	if len(b) == 0 {
		return nil, nil
	}
	err := json.Unmarshal(b, &out)
	return out, err
}

// sumEvidence adds up the rounds of one backup.
func sumEvidence(rounds []cbt.Evidence) cbt.Evidence {
	if len(rounds) == 0 {
		return cbt.Evidence{}
	}
	sum := rounds[0]
	sum.LeastMisses = append([]uint64(nil), sum.LeastMisses...)
	for _, e := range rounds[1:] {
		if sum.SavedState == "" {
			sum.SavedState = e.SavedState
		}
		sum.Earlier = sum.Earlier || e.Earlier
		sum.LastEpoch, sum.Closed = e.LastEpoch, e.Closed
		sum.Dirty += e.Dirty
		sum.Sectors += e.Sectors
		sum.Landed += e.Landed
		switch {
		case sum.FirstEpoch == 0: // the first round of a new beginning has no epochs
			sum.KernelSectors = e.KernelSectors
			sum.FirstEpoch, sum.Opened = e.FirstEpoch, e.Opened
		case sum.KernelSectors != nil && e.KernelSectors != nil:
			n := *sum.KernelSectors + *e.KernelSectors
			sum.KernelSectors = &n
		default:
			sum.KernelSectors = nil
		}
		for i, n := range e.LeastMisses {
			if i < len(sum.LeastMisses) {
				sum.LeastMisses[i] += n
			} else {
				sum.LeastMisses = append(sum.LeastMisses, n)
			}
		}
	}
	return sum
}
