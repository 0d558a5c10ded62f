package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// Check is one thing the tracker needs of the kernel.
type Check struct {
	Name string
	Err  error  // nil: it is there
	Note string // what was found
}

// Probe asks the running kernel for all that the tracker needs. It changes nothing.
func Probe() []Check {
	var u unix.Utsname
	release := ""
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	checks := []Check{{Name: "kernel", Note: release}}
	if kernelBefore(5, 17) {
		checks[0].Err = errors.New("too old: 5.17 is the oldest that has all the tracker needs (6.1 and 6.18 are tested)")
	}
	root := Check{Name: "privilege", Note: "root"}
	if os.Geteuid() != 0 {
		root = Check{Name: "privilege", Err: ErrPermission}
	}
	checks = append(checks, root, probeBTF(), probeBPFFS())
	loop := Check{Name: "BPF programs", Note: "tracing programs and bpf_loop"}
	if err := features.HaveProgramHelper(ebpf.Tracing, asm.FnLoop); err != nil {
		loop.Err = fmt.Errorf("bpf_loop in tracing programs (kernel 5.17): %w", err)
	}
	return append(checks, loop)
}

func probeBTF() Check {
	c := Check{Name: "BTF and tracepoints"}
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		c.Err = fmt.Errorf("%w: %w", ErrNoBTF, err)
		return c
	}
	for _, p := range []string{"block_bio_queue", "block_rq_complete", "block_bio_complete", "block_rq_issue"} {
		var t *btf.Typedef
		if err := spec.TypeByName("btf_trace_"+p, &t); err != nil {
			c.Err = fmt.Errorf("tracepoint %s: %w", p, err)
			return c
		}
	}
	c.Note = "block_bio_queue, block_rq_complete, block_bio_complete, block_rq_issue"
	return c
}

func probeBPFFS() Check {
	dir := filepath.Dir(DefaultDir)
	c := Check{Name: "bpffs", Note: "mounted at " + dir}
	if isBPFFS(dir) {
		return c
	}
	c.Note = "not mounted; it will be, at " + dir
	if _, err := os.Stat(dir); err != nil {
		c.Err = fmt.Errorf("%s: %w", dir, err)
	}
	return c
}
