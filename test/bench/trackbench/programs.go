package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
)

// program is what the kernel counted of one tracking program while its statistics
// were switched on.
type program struct {
	Name         string  `json:"name"`
	NsPerEvent   float64 `json:"ns_per_event"`
	RunsPerWrite float64 `json:"runs_per_write"`
}

// counter reads the statistics of a tracker's programs.
type counter struct{ links []link.ID }

func newCounter(t *bpf.Tracker) counter {
	var c counter
	for _, id := range t.LinkIDs() {
		c.links = append(c.links, link.ID(id))
	}
	return c
}

type stat struct {
	name string
	runs uint64
	time time.Duration
}

func (c counter) read() ([]stat, error) {
	var out []stat
	for _, id := range c.links {
		s, err := readStat(id)
		if err != nil {
			return nil, fmt.Errorf("link %d: %w", id, err)
		}
		out = append(out, s)
	}
	return out, nil
}

func readStat(id link.ID) (s stat, err error) {
	l, err := link.NewFromID(id)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	li, err := l.Info()
	if err != nil {
		return s, err
	}
	p, err := ebpf.NewProgramFromID(li.Program)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	pi, err := p.Info()
	if err != nil {
		return s, err
	}
	ps, err := p.Stats()
	if err != nil {
		return s, err
	}
	return stat{pi.Name, ps.RunCount, ps.Runtime}, nil
}

// during runs do with the kernel's BPF statistics on (BPF_ENABLE_STATS), which
// slow every program down, and returns what the programs did meanwhile for each of
// the writes that do reports.
func (c counter) during(do func() (writes int64, err error)) (out []program, err error) {
	on, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return nil, fmt.Errorf("BPF statistics: %w", err)
	}
	defer func() { err = errors.Join(err, on.Close()) }()
	before, err := c.read()
	if err != nil {
		return nil, err
	}
	writes, err := do()
	if err != nil {
		return nil, err
	}
	after, err := c.read()
	if err != nil {
		return nil, err
	}
	return perWrite(before, after, writes), nil
}

func perWrite(before, after []stat, writes int64) []program {
	var out []program
	for i, a := range after {
		p := program{Name: a.name}
		if runs := a.runs - before[i].runs; runs > 0 {
			p.NsPerEvent = float64(a.time-before[i].time) / float64(runs)
			p.RunsPerWrite = float64(runs) / float64(writes)
		}
		out = append(out, p)
	}
	return out
}

// strangers counts tracking programs that are loaded already: another tracker, which makes
// "none" a lie.
func strangers() (int, error) {
	n := 0
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, unix.ENOENT) {
			return n, nil
		}
		if err != nil {
			return n, fmt.Errorf("list BPF programs: %w", err)
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, unix.ENOENT) {
			continue // unloaded meanwhile
		}
		if err != nil {
			return n, err
		}
		info, err := p.Info()
		if err == nil && isTracking(info.Name) {
			n++
		}
		if err = errors.Join(err, p.Close()); err != nil {
			return n, err
		}
	}
}

// isTracking knows the names of bpf/tracker.bpf.c: a program and its copy.
func isTracking(name string) bool {
	i := strings.LastIndexByte(name, '_')
	return i > 0 && len(name) == i+2 && slices.Contains(bpf.ProgramNames(), name[:i])
}
