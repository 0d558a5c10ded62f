package agent_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

const diskSize = 24 << 20

// bench is a loop device, a tracker and a repository of the test's own.
type bench struct {
	dev  string
	file string // behind dev
	pins string
	repo *store.Repo
	job  agent.Job
	seam bpf.Misses
}

func newBench(t *testing.T) *bench {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: loop devices and BPF programs need root")
	}
	if _, err := exec.LookPath("losetup"); err != nil {
		t.Skip("SKIP: no losetup (apt-get install util-linux)")
	}
	b := &bench{}
	b.file = filepath.Join(t.TempDir(), "disk")
	data := make([]byte, diskSize)
	_, _ = rand.Read(data[:8<<20])
	if err := os.WriteFile(b.file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--show", "-f", b.file).Output()
	if err != nil {
		t.Skip("SKIP: losetup: ", err)
	}
	b.dev = strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", b.dev).Run() })

	b.pins = filepath.Join(filepath.Dir(bpf.DefaultDir), fmt.Sprintf("tidemark-agent-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-")))
	t.Cleanup(func() {
		if err := bpf.Remove(b.pins); err != nil {
			t.Error(err)
		}
	})
	b.repo, err = store.Init(t.Context(), filepath.Join(t.TempDir(), "repo"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.repo.Close() })
	b.job = agent.Job{
		VM: "vm", Disks: []string{b.dev}, Repo: b.repo, Tool: "test", Quiesce: agent.Quiesce{Kind: "auto"},
		Source: b.source,
	}
	return b
}

// source opens the tracker anew for each backup, as the command does.
func (b *bench) source(_ context.Context, path string) (cbt.Source, error) {
	tr, err := bpf.Open(bpf.Options{Dir: b.pins, Misses: b.misses})
	if err != nil {
		return nil, err
	}
	src, err := cbt.OpenTracked(tr, path, bpf.DefaultGranuleShift)
	if err != nil {
		return nil, errors.Join(err, tr.Close())
	}
	return ownedSource{src, tr}, nil
}

func (b *bench) misses(m bpf.Misses) bpf.Misses {
	for i := range m {
		m[i] += b.seam[i]
	}
	return m
}

// ownedSource closes the tracker together with the source.
type ownedSource struct {
	*cbt.Tracked
	tracker *bpf.Tracker
}

func (s ownedSource) Close() error { return errors.Join(s.Tracked.Close(), s.tracker.Close()) }

func (b *bench) run(t *testing.T) agent.Result {
	t.Helper()
	r, err := b.job.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (b *bench) write(t *testing.T, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(b.dev, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

// wantContent compares a point with what the device holds now.
func (b *bench) wantContent(t *testing.T, p *store.Point) {
	t.Helper()
	want, err := os.ReadFile(b.dev)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.content(t, p); !bytes.Equal(got, want) {
		t.Error("the point is not what the disk was")
	}
}

func (b *bench) content(t *testing.T, p *store.Point) []byte {
	t.Helper()
	root := p.Disks[0].Root
	m, err := b.repo.Map(root)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, m.Grains()*int64(root.Grain))
	for i := range m.Grains() {
		ref, err := m.Lookup(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		if ref.IsZero() {
			continue
		}
		if err := b.repo.ReadGrain(t.Context(), ref, out[i*int64(root.Grain):][:root.Grain]); err != nil {
			t.Fatal(err)
		}
	}
	return out[:root.Size]
}

func TestBackupReadsOnlyWhatChanged(t *testing.T) {
	b := newBench(t)
	full := b.run(t)
	d := full.Point.Disks[0]
	if d.Tracking.Mode != "full" || d.Stats.Read != diskSize || d.Stats.Stored < 8<<20 || d.Stats.Stored > 9<<20 {
		t.Errorf("full: %+v", d)
	}
	b.wantContent(t, full.Point)

	b.write(t, 5<<20+100, []byte("changed"))
	b.write(t, 20<<20, make([]byte, 128<<10)) // zeroes over zeroes: read, but not stored
	inc := b.run(t)
	d = inc.Point.Disks[0]
	if d.Tracking.Mode != "tracked" || d.Stats.Read != 192<<10 || d.Stats.Changed != 64<<10 {
		t.Errorf("incremental: mode %s, read %d, changed %d", d.Tracking.Mode, d.Stats.Read, d.Stats.Changed)
	}
	if inc.Point.Consistency != store.Crash || inc.Point.Quiesce.Paused != 0 {
		t.Errorf("an idle disk: %s, paused %v", inc.Point.Consistency, inc.Point.Quiesce.Paused)
	}
	b.wantContent(t, inc.Point)

	none := b.run(t)
	if d = none.Point.Disks[0]; d.Stats.Read != 0 || d.Stats.Changed != 0 {
		t.Errorf("nothing changed: read %d, changed %d", d.Stats.Read, d.Stats.Changed)
	}
}

// Whatever made the epoch unknown: the whole disk is read, only what differs is
// stored, the point says why, and the next backup is an incremental again.
func TestUnknownEpochIsComparedAndSaysWhy(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, b *bench)
		why   string
	}{
		"missed": {func(_ *testing.T, b *bench) {
			for i := range 3 {
				b.seam[i] += 9 // all copies of one program
			}
		}, "dropped tracing events"},
		"detached": {func(t *testing.T, b *bench) {
			if err := os.Remove(filepath.Join(b.pins, "gen-1", "link-bio_queue_0")); err != nil {
				t.Fatal(err)
			}
		}, "program bio_queue_0 was detached"},
		"replaced": {func(t *testing.T, b *bench) {
			for _, args := range [][]string{{"-d", b.dev}, {b.dev, b.file}} {
				if out, err := exec.Command("losetup", args...).CombinedOutput(); err != nil {
					t.Fatalf("losetup %v: %v: %s", args, err, out)
				}
			}
		}, "diskseq changed"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.run(t)
			b.write(t, 1<<20, []byte("changed"))
			c.spoil(t, b)
			r := b.run(t)
			d := r.Point.Disks[0]
			if d.Tracking.Mode != "compare" || !strings.Contains(strings.Join(d.Tracking.Reasons, ";"), c.why) {
				t.Errorf("mode %s because %q, want %q", d.Tracking.Mode, d.Tracking.Reasons, c.why)
			}
			if d.Stats.Read != diskSize || d.Stats.Changed != 64<<10 || d.Stats.Stored > 256<<10 {
				t.Errorf("compare: read %d, changed %d, stored %d", d.Stats.Read, d.Stats.Changed, d.Stats.Stored)
			}
			b.wantContent(t, r.Point)
			if r = b.run(t); r.Point.Disks[0].Tracking.Mode != "tracked" {
				t.Errorf("the backup after it: %s %q", r.Point.Disks[0].Tracking.Mode, r.Point.Disks[0].Tracking.Reasons)
			}
		})
	}
}

// A map that can't be read any more is not built upon: the next point begins anew.
func TestDamagedPointIsNotContinued(t *testing.T) {
	b := newBench(t)
	b.run(t)
	b.write(t, 1<<20, []byte("changed"))
	packs, err := filepath.Glob(filepath.Join(b.repo.Location(), "packs/*/*"))
	if err != nil || len(packs) == 0 {
		t.Fatal(packs, err)
	}
	for _, p := range packs {
		if err := os.Chmod(p, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(p, 100); err != nil {
			t.Fatal(err)
		}
	}
	r := b.run(t)
	d := r.Point.Disks[0]
	if d.Tracking.Mode != "full" || !strings.Contains(strings.Join(d.Tracking.Reasons, ";"), "can't be continued") {
		t.Errorf("mode %s because %q", d.Tracking.Mode, d.Tracking.Reasons)
	}
	b.wantContent(t, r.Point)
}

func TestFailedBackupIsMadeUpForByTheNext(t *testing.T) {
	b := newBench(t)
	b.run(t)
	b.write(t, 2<<20, []byte("changed"))
	ctx, cancel := context.WithCancel(t.Context())
	job := b.job
	job.Progress = func(agent.Progress) { cancel() } // in the first round, after the swap
	if _, err := job.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	r := b.run(t)
	if r.Point.Disks[0].Stats.Changed != 64<<10 || r.Point.Disks[0].Tracking.Mode != "tracked" {
		t.Errorf("%+v", r.Point.Disks[0])
	}
	b.wantContent(t, r.Point)
}

// scribbler is a process that rewrites part of a device without end. Each pass
// writes one number everywhere, so that a torn instant shows.
func scribbler(t *testing.T, dev string) *exec.Cmd {
	t.Helper()
	c := exec.Command("sh", "-c", `i=0; while :; do i=$((i+1)); yes "$i" | dd of="$0" bs=4k count=16 seek=$((i%200*16)) iflag=fullblock oflag=direct conv=notrunc status=none 2>/dev/null; done`, dev)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	waitForWrites(t, dev)
	return c
}

// waitForWrites returns when somebody is writing to the device: a process that was just
// started may take longer to begin than a backup of an idle disk.
func waitForWrites(t *testing.T, dev string) {
	t.Helper()
	stat := func() string {
		b, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/stat")
		if err != nil || len(strings.Fields(string(b))) < 7 {
			t.Fatalf("%s: %v", b, err)
		}
		return strings.Fields(string(b))[6] // sectors written
	}
	for was, changed := stat(), 0; changed < 3; time.Sleep(time.Millisecond) {
		if now := stat(); now != was {
			was, changed = now, changed+1
		}
		if t.Context().Err() != nil {
			t.Fatal(t.Context().Err())
		}
	}
}

func TestBusyDiskIsRefusedUnlessAllowed(t *testing.T) {
	b := newBench(t)
	b.run(t)
	for range 4 { // one may have to wait for a processor, and the disk be quiet meanwhile
		scribbler(t, b.dev)
	}
	b.job.Quiesce = agent.Quiesce{Kind: "none"}
	if r, err := b.job.Run(t.Context()); !errors.Is(err, agent.ErrInUse) {
		t.Fatalf("got %v, want %v; the point: %+v", err, agent.ErrInUse, r.Point)
	}
	b.job.AllowInconsistent = true
	if r := b.run(t); r.Point.Consistency != store.None {
		t.Errorf("consistency %q", r.Point.Consistency)
	}
}

func TestFreezeMakesAFilesystemInstant(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	for _, c := range [][]string{{"mkfs.ext4", "-q", "-F", b.dev}, {"mount", b.dev, dir}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Skipf("SKIP: %v: %v: %s", c, err, out)
		}
	}
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	b.run(t)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
				_ = os.WriteFile(filepath.Join(dir, "f"), bytes.Repeat([]byte{byte(i)}, 100<<10), 0o600)
			}
		}
	}()
	b.job.PauseBudget = 3 * time.Second
	r := b.run(t)
	close(stop)
	<-done
	if r.Point.Quiesce.Method == "freeze" && r.Point.Consistency != store.Filesystem {
		t.Errorf("%+v %s", r.Point.Quiesce, r.Point.Consistency)
	}
	t.Logf("%s: %+v", r.Chosen, r.Point.Quiesce)
	img := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(img, b.content(t, r.Point), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("e2fsck", "-fn", img).CombinedOutput(); err != nil {
		t.Errorf("a frozen file system is not clean: %v: %s", err, out)
	}
}

var _ io.Closer = (*store.Repo)(nil)
