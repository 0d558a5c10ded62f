package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// auditor adopts what b.source began.
func (b *bench) auditor(_ context.Context, path string) (cbt.Auditor, error) {
	tr, err := bpf.Open(bpf.Options{Dir: b.pins, AdoptOnly: true, Misses: b.misses})
	if err != nil {
		return nil, errors.Join(cbt.ErrUnproven, err)
	}
	src, err := cbt.Adopt(tr, path)
	if err != nil {
		return nil, errors.Join(err, tr.Close())
	}
	return ownedSource{src, tr}, nil
}

func (b *bench) audit(t *testing.T) agent.Audit {
	return agent.Audit{VM: "vm", Repo: b.repo, Source: b.auditor, All: true, Evidence: filepath.Join(t.TempDir(), "evidence"), Tool: "test"}
}

// forge changes the disk below the device, where no tracker of it can see that.
func (b *bench) forge(t *testing.T, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(b.file, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
	b.dropCaches(t)
}

// dropCaches makes readers of the device see what the file holds.
func (b *bench) dropCaches(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("blockdev", "--flushbufs", b.dev).CombinedOutput(); err != nil {
		t.Fatalf("blockdev: %v: %s", err, out)
	}
}

func wantClean(t *testing.T, a agent.Audit) agent.AuditedDisk {
	t.Helper()
	r, err := a.Run(t.Context())
	if err != nil {
		t.Fatalf("%v: %+v", err, r)
	}
	d := r.Disks[0]
	if d.Mismatched+d.Unsteady != 0 || d.Sampled != d.Good+d.Void {
		t.Errorf("%+v", d)
	}
	return d
}

func TestAuditIsQuietWhereNothingWasMissed(t *testing.T) {
	b := newBench(t)
	b.run(t)
	b.write(t, 1<<20, []byte("changed"))
	b.write(t, 9<<20, make([]byte, 200<<10))
	d := wantClean(t, b.audit(t))
	// One granule and four.
	if d.Granules != 384 || d.Unchanged != 379 || d.Good != 379 || !d.Exact || d.Read != 379<<16 {
		t.Errorf("%+v", d)
	}
	a := b.audit(t)
	a.All, a.Samples, a.Seed = false, 100, 7
	if d = wantClean(t, a); d.Sampled != 100 || d.Good != 100 || d.Read != 100<<16 || d.Bound < 3 || d.Bound > 15 {
		t.Errorf("sampled: %+v", d)
	}
	a.Until, a.Samples = time.Now().Add(-time.Second), 0
	if d = wantClean(t, a); d.Sampled != 0 || d.Early == "" || d.Bound != d.Unchanged+1 {
		t.Errorf("no time: %+v", d)
	}
	// The audit closed no epoch and took no mark away.
	if r := b.run(t); r.Point.Disks[0].Stats.Read != 5<<16 || r.Point.Disks[0].Tracking.Mode != "tracked" {
		t.Errorf("the backup after it: %+v", r.Point.Disks[0])
	}
}

// What lies in the host's page cache is written, and marked, when the audit reads there.
func TestAuditSeesDirtyPages(t *testing.T) {
	b := newBench(t)
	b.run(t)
	f, err := os.OpenFile(b.dev, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for off := int64(0); off < diskSize; off += 1 << 20 {
		if _, err := f.WriteAt([]byte("not written back yet"), off); err != nil {
			t.Fatal(err)
		}
	}
	if d := wantClean(t, b.audit(t)); d.Void+384-d.Unchanged < 24 || !d.Exact {
		t.Errorf("%+v", d)
	}
}

// Writers of every kind, and backups between the audits: whatever is in flight, no alarm.
func TestAuditNeverCriesWolf(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("SKIP: no fio (apt-get install fio)")
	}
	b := newBench(t)
	b.run(t)
	stop := auditWriters(t, b.dev)
	b.job.Quiesce, b.job.AllowInconsistent = agent.Quiesce{Kind: "none"}, true
	span := 8 * time.Second
	if s := os.Getenv("TIDEMARK_AUDIT_TIME"); s != "" {
		var err error
		if span, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	var runs, void, good int64
	begin := time.Now()
	for ; time.Since(begin) < span || runs < 10; runs++ {
		if runs%4 == 3 {
			if r := b.run(t); r.Point.Disks[0].Tracking.Mode != "tracked" {
				t.Fatalf("%+v", r.Point.Disks[0])
			}
		}
		d := wantClean(t, b.audit(t))
		void += d.Void
		good += d.Good
	}
	stop()
	t.Logf("%d audits: %d granules good, %d void", runs, good, void)
	if void == 0 || good == 0 {
		t.Error("the writers and the audits did not meet")
	}
	if r := b.run(t); r.Point.Disks[0].Tracking.Mode != "tracked" {
		t.Errorf("an audit spoiled the tracking: %+v", r.Point.Disks[0])
	}
}

// auditWriters writes slowly enough that most granules stay unchanged for a while.
func auditWriters(t *testing.T, dev string) (stop func()) {
	t.Helper()
	var all []*exec.Cmd
	for _, args := range [][]string{
		{"--name=direct", "--rw=randwrite", "--bsrange=4k-256k", "--blockalign=4k", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rate_iops=40"},
		{"--name=sectors", "--rw=randwrite", "--bs=512", "--direct=1", "--ioengine=psync", "--rate_iops=40", "--size=6m"},
		{"--name=buffered", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--ioengine=psync", "--rate_iops=40", "--offset=12m", "--size=6m"},
		{"--name=trim", "--rw=randtrim", "--bs=64k", "--direct=1", "--ioengine=psync", "--rate_iops=10", "--offset=18m", "--size=6m"},
	} {
		c := exec.Command("fio", append(args, "--filename="+dev, "--time_based", "--runtime=7200", "--norandommap")...)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	stop = func() {
		for _, c := range all {
			_ = c.Process.Signal(syscall.SIGTERM)
			_ = c.Wait()
		}
		all = nil
	}
	t.Cleanup(stop)
	return stop
}

func TestAuditFindsWhatWasMissed(t *testing.T) {
	b := newBench(t)
	full := b.run(t).Point.ID
	b.write(t, 3<<20, []byte("recorded"))
	last := b.run(t).Point.ID
	const off = 5<<20 + 4096
	b.forge(t, off, []byte("behind the tracker's back"))
	b.forge(t, 3<<20, bytes.Repeat([]byte{7}, 70<<10)) // two granules
	b.write(t, 10<<20, []byte("recorded too"))

	a := b.audit(t)
	r, err := a.Run(t.Context())
	if !errors.Is(err, agent.ErrUnrecorded) {
		t.Fatalf("got %v: %+v", err, r)
	}
	for _, want := range []string{b.dev, "BLAKE3", "length 65536", "(granules: 3)"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the alarm doesn't say %q: %v", want, err)
		}
	}
	d := r.Disks[0]
	if d.Mismatched != 3 || d.Unchanged != 383 || d.Good != 380 || d.Bound != 0 || d.Trusted != full || r.Point != last {
		t.Errorf("%+v", d)
	}
	wantEvidence(t, d, r.Point, off)

	// Until the next backup nothing can be proven any more.
	if _, err := a.Run(t.Context()); !errors.Is(err, cbt.ErrUnproven) || !strings.Contains(err.Error(), "an audit found a change") {
		t.Errorf("a second audit: %v", err)
	}
	next := b.run(t).Point
	if k := next.Disks[0].Tracking; k.Mode != "compare" || !strings.Contains(strings.Join(k.Reasons, ";"), "an audit found a change that was not recorded") {
		t.Errorf("the next backup: %s %q", k.Mode, k.Reasons)
	}
	b.wantContent(t, next)
	if d := wantClean(t, a); !d.Exact {
		t.Errorf("the audit after it: %+v", d)
	}
	if k := b.run(t).Point.Disks[0].Tracking; k.Mode != "tracked" {
		t.Errorf("the backup after that: %s %q", k.Mode, k.Reasons)
	}
}

func wantEvidence(t *testing.T, d agent.AuditedDisk, point string, forged int64) {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join(d.Evidence, "audit.json"))
	if err != nil {
		t.Fatal(err)
	}
	var e struct {
		Point   string
		Tracker cbt.Evidence `json:"tracker"`
	}
	if err := json.Unmarshal(doc, &e); err != nil {
		t.Fatal(err)
	}
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if k := e.Tracker; e.Point != point || k.BootID != strings.ReplaceAll(strings.TrimSpace(string(boot)), "-", "") || len(k.LinkIDs) == 0 || len(k.LinkIDs)%len(bpf.ProgramNames()) != 0 || len(k.Missed) != len(k.LinkIDs) || k.FirstEpoch == 0 || k.DiskSeq == 0 {
		t.Errorf("%s", doc)
	}
	bins, _ := filepath.Glob(filepath.Join(d.Evidence, "disk-*.bin"))
	if len(bins) != len(d.Mismatches) {
		t.Errorf("%d files of %d mismatches", len(bins), len(d.Mismatches))
	}
	found := false
	for _, m := range d.Mismatches {
		if m.Off <= forged && forged < m.Off+m.Len {
			found = true
			b, err := os.ReadFile(filepath.Join(d.Evidence, "disk-5242880.bin"))
			if err != nil || !bytes.HasPrefix(b[forged-m.Off:], []byte("behind")) {
				t.Errorf("%v: %.40q", err, b)
			}
		}
	}
	if !found {
		t.Errorf("nothing was found at %d: %+v", forged, d.Mismatches)
	}
}

// The repository's grain and the tracker's granule differ, and the disk ends within both.
func TestAuditKnowsGrainsAndTheEndOfTheDisk(t *testing.T) {
	for name, grain := range map[string]int{"small": 4 << 10, "large": 256 << 10} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			const size = diskSize - 7*512
			if err := os.Truncate(b.file, size); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("losetup", "-c", b.dev).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			b.job.Grain = grain
			b.run(t)
			if d := wantClean(t, b.audit(t)); !d.Exact || d.Granule != int64(max(grain, 64<<10)) || d.Read != size {
				t.Errorf("%+v", d)
			}
			b.write(t, 1<<20, []byte("changed"))
			b.forge(t, 1<<20+200<<10, []byte("missed beside it"))
			b.forge(t, size-3, []byte("end"))
			r, err := b.audit(t).Run(t.Context())
			if !errors.Is(err, agent.ErrUnrecorded) {
				t.Fatalf("got %v", err)
			}
			// Where the next backup reads anyway, there is nothing to find.
			want := map[string]int64{"small": 2, "large": 1}[name]
			d := r.Disks[0]
			last := d.Mismatches[len(d.Mismatches)-1]
			if d.Mismatched != want || last.Off+last.Len != size || len(last.Grains) != 1 {
				t.Errorf("%+v", d)
			}
			b.wantContent(t, b.run(t).Point)
		})
	}
}

// Where nothing can be compared, that is said, and is no alarm.
func TestAuditWithoutGround(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, b *bench)
		err   error
		why   string
	}{
		"no point": {nil, agent.ErrNotAuditable, "no restore point"},
		"untracked": {func(t *testing.T, b *bench) {
			b.run(t)
			if err := bpf.Remove(b.pins); err != nil {
				t.Fatal(err)
			}
		}, cbt.ErrUnproven, "no tracker is attached"},
		"other registration": {func(t *testing.T, b *bench) {
			b.run(t)
			if err := bpf.Remove(b.pins); err != nil {
				t.Fatal(err)
			}
			src, err := b.source(t.Context(), b.dev)
			if err != nil {
				t.Fatal(err)
			}
			_ = src.Close()
		}, cbt.ErrUnproven, "another tracking"},
		"missed": {func(t *testing.T, b *bench) {
			b.run(t)
			for i := range 3 {
				b.seam[i] += 9
			}
		}, cbt.ErrUnproven, "dropped tracing events"},
		"other repository": {func(t *testing.T, b *bench) {
			b.run(t)
			src, err := b.source(t.Context(), b.dev)
			if err != nil {
				t.Fatal(err)
			}
			d, err := src.Changes(t.Context(), cbt.ChangeID{})
			if err := errors.Join(err, src.Commit(d.ID), src.Close()); err != nil {
				t.Fatal(err)
			}
		}, cbt.ErrUnproven, "another repository"},
		"replaced": {func(t *testing.T, b *bench) {
			b.run(t)
			for _, args := range [][]string{{"-d", b.dev}, {b.dev, b.file}} {
				if out, err := exec.Command("losetup", args...).CombinedOutput(); err != nil {
					t.Fatalf("losetup %v: %v: %s", args, err, out)
				}
			}
		}, cbt.ErrUnproven, "diskseq"},
		"grown": {func(t *testing.T, b *bench) {
			b.run(t)
			if err := os.Truncate(b.file, 2*diskSize); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("losetup", "-c", b.dev).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}, agent.ErrNotAuditable, "bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			if c.spoil != nil {
				c.spoil(t, b)
			}
			b.forge(t, 1<<20, []byte("whatever the disk holds"))
			r, err := b.audit(t).Run(t.Context())
			if !errors.Is(err, c.err) || errors.Is(err, agent.ErrUnrecorded) || !strings.Contains(err.Error(), c.why) {
				t.Errorf("got %v: %+v, want %v because %q", err, r, c.err, c.why)
			}
		})
	}
}

// A backup that slips in before the audit holds the device is no reason to blame the tracker.
func TestAuditBesideABackup(t *testing.T) {
	b := newBench(t)
	b.run(t)
	a := b.audit(t)
	a.Source = func(ctx context.Context, path string) (cbt.Auditor, error) {
		b.write(t, 1<<20, []byte("changed"))
		b.run(t)
		return b.auditor(ctx, path)
	}
	if r, err := a.Run(t.Context()); !errors.Is(err, agent.ErrNotAuditable) || !strings.Contains(err.Error(), "another point meanwhile") {
		t.Errorf("%v: %+v", err, r)
	}
	// While it holds the device, no backup runs.
	a.Source = func(ctx context.Context, path string) (cbt.Auditor, error) {
		src, err := b.auditor(ctx, path)
		if _, err := b.job.Run(ctx); !errors.Is(err, bpf.ErrBusy) {
			t.Errorf("a backup beside the audit: %v", err)
		}
		return src, err
	}
	wantClean(t, a)
}
