package cbt_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

const replaced = "tracking programs of image files were replaced, attached or detached"

// wantGranules checks that a delta is known and holds one granule at each offset.
func wantGranules(t *testing.T, d cbt.Delta, offs ...int64) {
	t.Helper()
	var want cbt.Extents
	for _, off := range offs {
		want = append(want, cbt.Extent{Off: off, Len: 64 << 10})
	}
	if len(d.Unknown) > 0 || !slices.Equal(d.Extents, want) {
		t.Errorf("got %s, want %v", describe(d), want)
	}
}

func wantPins(t *testing.T, pins, pattern string, n int) {
	t.Helper()
	if all, err := filepath.Glob(filepath.Join(pins, pattern)); err != nil || len(all) != n {
		t.Errorf("pinned are %v (%v), want %d of %s", all, err, n, pattern)
	}
}

// throughUpgrade takes a file across a replacement of the tracker's programs: its registration goes on, one
// delta is unknown and says why, the next is known.
func throughUpgrade(t *testing.T, o bpf.Options, file string, id cbt.ChangeID) cbt.ChangeID {
	t.Helper()
	write(t, file, 2<<20)
	s := openFile(t, o, file)
	defer func() { _ = s.Close() }()
	if why := s.Began(); len(why) > 0 {
		t.Errorf("tracking began anew: %v", why)
	}
	d := changes(t, s, id)
	wantUnknown(t, d, smallImage, replaced)
	if len(d.Unknown) != 1 {
		t.Errorf("other reasons too: %v", d.Unknown)
	}
	if registration(d.ID) != registration(id) {
		t.Errorf("%s after %s: another registration", d.ID, id)
	}
	write(t, file, 3<<20)
	d = changes(t, s, d.ID)
	wantGranules(t, d, 3<<20)
	if err := s.Commit(d.ID); err != nil {
		t.Error(err)
	}
	return d.ID
}

func registration(id cbt.ChangeID) string {
	r, _, _ := strings.Cut(id.String(), ".")
	return r
}

// Programs of another version take over what is tracked: devices without a gap, files with one that
// is known.
func TestFileUpgrade(t *testing.T) {
	needsUpgrade(t)
	onEach(t, func(t *testing.T, fstype, dir string) {
		file, dev, pins := imageFile(t, dir, smallImage), loopDevice(t, small, ""), pinDir(t)
		s := openFile(t, bpf.Options{Dir: pins}, file)
		id := changes(t, s, cbt.ChangeID{}).ID
		_ = s.Close()
		s = open(t, bpf.Options{Dir: pins}, dev)
		devID := changes(t, s, cbt.ChangeID{}).ID
		_ = s.Close()
		write(t, file, 1<<20)
		write(t, dev, 1<<20)

		o := bpf.Options{Dir: pins, Variant: 1}
		tr, err := bpf.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if why := tr.Outdated(); why != "" || strings.Contains(tr.Began(), "not taken over") {
			t.Errorf("not all was upgraded: %s; %s", why, tr.Began())
		}
		all, err := tr.Status()
		if err != nil || len(all) != 2 || !all[1].Image || all[1].Loss != bpf.LossHooks || all[0].Loss != 0 {
			t.Errorf("status: %+v, %v", all, err)
		}
		_ = tr.Close()
		id = throughUpgrade(t, o, file, id)
		wantPins(t, pins, "gen-*", 1)
		wantPins(t, pins, "dev-*", 2)
		wantPins(t, pins, "dev-0/e*", 1)
		s = open(t, o, dev)
		wantGranules(t, changes(t, s, devID), 1<<20)
		_ = s.Close()

		if fstype != "ext4" && os.Getenv("TIDEMARK_TESTVM") != "" {
			return // emulated, it takes a minute
		}
		// And once more, with nobody looking in between.
		for v := range uint32(2) {
			tr, err := bpf.Open(bpf.Options{Dir: pins, Variant: v + 2})
			if err != nil {
				t.Fatal(err)
			}
			_ = tr.Close()
		}
		o.Variant = 3
		throughUpgrade(t, o, file, id)
	})
}

// A tracking program of devices has missed an event: the tracker grows, files go with it.
func TestFileMoreCopies(t *testing.T) {
	needsUpgrade(t)
	needsFileHooks(t, "ext4")
	file, pins := imageFile(t, mountNew(t, "ext4", 0, ""), smallImage), pinDir(t)
	var l lossy
	o := bpf.Options{Dir: pins, Misses: l.instead}
	s := openFile(t, o, file)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	l.extra[0] = 1
	throughUpgrade(t, o, file, id)
}

// Whoever comes after an upgrade that was killed finds the file tracked, and what is not known of it said.
func TestFileUpgradeIsKilled(t *testing.T) {
	needsUpgrade(t)
	needsFileHooks(t, "ext4")
	file, pins := imageFile(t, mountNew(t, "ext4", 0, ""), smallImage), pinDir(t)
	s := openFile(t, bpf.Options{Dir: pins}, file)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	variant := uint32(0)
	steps := upgradeSteps
	if os.Getenv("TIDEMARK_TESTVM") != "" {
		steps = []string{"install", "retire", "done"} // emulated, each takes a minute
	}
	for _, step := range steps {
		t.Run(step, func(t *testing.T) {
			c := exec.Command(os.Args[0])
			c.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%s|%d", upgradeEnv, pins, step, variant+1))
			out, err := c.Output()
			if err == nil || strings.Contains(string(out), "error") || !strings.Contains(string(out), step) {
				t.Fatalf("%v: %s", err, out)
			}
			if step == "publish" || step == "done" {
				variant++
			}
			id = throughUpgrade(t, bpf.Options{Dir: pins, Variant: variant}, file, id)
			wantPins(t, pins, "gen-*", 1)
			wantPins(t, pins, "dev-*", 1)
			wantPins(t, pins, "dev-0/e*", 1)
		})
	}
}

// Another layout is a new beginning, that says so and leaves nothing of before.
func TestFileAnotherLayout(t *testing.T) {
	needsFileHooks(t, "ext4")
	file, pins := imageFile(t, mountNew(t, "ext4", 0, ""), smallImage), pinDir(t)
	s := openFile(t, bpf.Options{Dir: pins}, file)
	id := changes(t, s, cbt.ChangeID{}).ID
	_ = s.Close()
	anotherLayout(t, pins)
	tr, err := bpf.Open(bpf.Options{Dir: pins})
	if err != nil {
		t.Fatal(err)
	}
	_ = tr.Close()
	wantPins(t, pins, "dev-*", 0)
	s = openFile(t, bpf.Options{Dir: pins}, file)
	wantUnknown(t, changes(t, s, id), smallImage, "another map layout")
}

// All file systems share a function: programs that come to it or go for one of them make the epochs of the
// others' files unknown.
func TestFileHooksOfAnotherFileSystem(t *testing.T) {
	needsFileHooks(t, "ext4")
	needsFileHooks(t, "xfs")
	file, other := imageFile(t, mountNew(t, "ext4", 0, ""), smallImage), imageFile(t, mountNew(t, "xfs", 0, ""), smallImage)
	o := bpf.Options{Dir: pinDir(t)}
	s := openFile(t, o, file)
	id := changes(t, s, cbt.ChangeID{}).ID
	second := openFile(t, o, other)
	d := changes(t, s, id)
	wantUnknown(t, d, smallImage, replaced)
	write(t, file, 1<<20)
	d = changes(t, s, d.ID)
	wantGranules(t, d, 1<<20)
	if err := second.Untrack(); err != nil {
		t.Fatal(err)
	}
	d = changes(t, s, d.ID)
	wantUnknown(t, d, smallImage, replaced)
	if d = changes(t, s, d.ID); len(d.Unknown) > 0 {
		t.Errorf("the next one: %v", d.Unknown)
	}
}

// Why that has to be: programs that come to a function while somebody is in it keep those that were
// attached from seeing him leave.
func TestFileEndIsNotSeenWhereProgramsAreAttached(t *testing.T) {
	needsFileHooks(t, "ext4")
	dir := mountNew(t, "ext4", time.Millisecond, "")
	file := imageFile(t, dir, smallImage)
	s := openFile(t, bpf.Options{Dir: pinDir(t)}, file)
	id := changes(t, s, cbt.ChangeID{}).ID
	landed := func(meanwhile func()) uint64 {
		setDelay(t, deviceOf(t, dir), 5*time.Second)
		done := make(chan error)
		go func() {
			f, err := os.OpenFile(file, os.O_RDWR|syscall.O_DIRECT, 0)
			if err == nil {
				_, err = f.WriteAt(aligned(4096), 0)
				_ = f.Close()
			}
			done <- err
		}()
		time.Sleep(time.Second)
		meanwhile()
		select {
		case err := <-done:
			t.Log(err)
			t.Skip("SKIP: it took longer to attach a program than the write took")
		default:
		}
		setDelay(t, deviceOf(t, dir), time.Millisecond) // waits for the write
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		d := changes(t, s, id)
		id = d.ID
		return d.Evidence.Landed
	}
	alone := landed(func() {})
	disturbed := landed(func() {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFExit, AttachTo: "ext4_file_write_iter", License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = p.Close() })
		l, err := link.AttachTracing(link.TracingOptions{Program: p})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
	})
	t.Logf("sectors seen to land: %d alone, %d where programs were attached meanwhile", alone, disturbed)
	if disturbed >= alone {
		t.Error("the kernel tells of all ends: LossHooks may be needless")
	}
}
