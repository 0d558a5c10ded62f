package bpf

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
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
		checks[0].Err = ErrOldKernel
	}
	root := Check{Name: "privilege", Note: "root"}
	if os.Geteuid() != 0 {
		root = Check{Name: "privilege", Err: ErrPermission}
	}
	checks = append(checks, root, probeBTF(), probeBPFFS())
	return append(checks, probeLoad())
}

// probeLoad lets the kernel's verifier look at the programs. They are not attached.
func probeLoad() Check {
	c := Check{Name: "BPF programs", Note: "the verifier accepts them"}
	if addr, err := kernelSymbol("bio_chain_endio"); err != nil || addr == 0 {
		c.Note += "; /proc/kallsyms hides bio_chain_endio (kernel.kptr_restrict): device-mapper and md disks whose writes are split will be compared each time"
	}
	spec, err := trackerSpec()
	if err == nil {
		var coll *ebpf.Collection
		if coll, err = ebpf.NewCollection(spec); err == nil {
			coll.Close()
		}
	}
	if c.Err = err; err != nil && os.Geteuid() != 0 {
		c.Err = ErrPermission
	}
	return c
}

func probeBTF() Check {
	c := Check{Name: "BTF and tracepoints"}
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		c.Err = fmt.Errorf("%w: %w", ErrNoBTF, err)
		return c
	}
	for _, p := range []string{"block_bio_queue", "block_rq_complete", "block_bio_complete"} {
		if err := findTracepoint(spec, p); err != nil {
			c.Err = fmt.Errorf("tracepoint %s: %w", p, err)
			return c
		}
	}
	c.Note = "block_bio_queue, block_rq_complete, block_bio_complete"
	return c
}

func findTracepoint(spec *btf.Spec, name string) error {
	var t *btf.Typedef
	return spec.TypeByName("btf_trace_"+name, &t)
}

func hasTracepoint(name string) bool {
	spec, err := btf.LoadKernelSpec()
	return err == nil && findTracepoint(spec, name) == nil
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
