package bpf

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// pinnedHook attaches a program that does nothing, and leaves it to its pin in a new directory. Where functions
// can't be traced, it hangs on a tracepoint: the kernel drops both kinds of links in the same way.
func pinnedHook(t *testing.T) (dir string, id ebpf.ProgramID) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIP: attaching BPF programs needs root")
	}
	dir = testDir(t)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "block_bio_queue", License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	info, err := l.Info()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Pin(filepath.Join(dir, "link-x")); err != nil {
		t.Fatal(err)
	}
	return dir, info.Program
}

// Programs whose pins are gone are attached for a while still: a change of them is not over before.
func TestUnpinHooksWaitsForTheKernel(t *testing.T) {
	dir, id := pinnedHook(t)
	detached, err := unpinHooks(filepath.Join(dir, "link-*"), detachLimit, func() error { return os.RemoveAll(dir) })
	if err != nil || !detached {
		t.Errorf("detached: %v, %v", detached, err)
	}
	if p, err := ebpf.NewProgramFromID(id); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the program is there: %v, %v", p, err)
	}
}

// As long as somebody has one of them open, it is not known that they are detached.
func TestUnpinHooksThatSomebodyHolds(t *testing.T) {
	dir, id := pinnedHook(t)
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	if detached, err := unpinHooks(filepath.Join(dir, "link-*"), 200*time.Millisecond, func() error { return os.RemoveAll(dir) }); err != nil || detached {
		t.Errorf("detached: %v, %v", detached, err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pins are there: %v", err)
	}
}
