package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// table is servers that show the same disk. The first is what the others are compared with.
type table struct {
	Name    string    `json:"name"`
	Servers []*server `json:"servers"`
	Rows    []*row    `json:"rows"`
}

// row is one kind of load.
type row struct {
	Name  string  `json:"name"`
	Cells []*cell `json:"cells"` // one per server

	load
	state string // cold, warm; else it does not matter
}

// cell is what one server did under one load: one value per round.
type cell struct {
	Rate measure.Sample `json:"bytes_per_second"`
	Ops  measure.Sample `json:"requests_per_second"`
	P99  measure.Sample `json:"p99_us"`
	CPU  measure.Sample `json:"cpu_us_per_request"` // of the server
	GiB  measure.Sample `json:"cpu_s_per_gib"`

	// The first server's rate and processor time per byte in terms of this one's; nil for the first itself.
	RateRatio *measure.Interval `json:"rate_ratio,omitempty"`
	P99Ratio  *measure.Interval `json:"p99_ratio,omitempty"`
	CPURatio  *measure.Interval `json:"cpu_ratio,omitempty"`
}

const (
	cold = "cold"
	warm = "warm"

	// warmBytes is what of a point's disk is read again and again: it fits into the cache of
	// "tidemark export", 256 MiB.
	warmBytes = 192 << 20
	// coldReads bounds the random reads of a cold disk, so that it stays one.
	coldReads = 2000
)

var ways = map[string]string{"randread": "random read", "randwrite": "random write", "read": "sequential read", "write": "sequential write"}

func (l load) String() string {
	block := fmt.Sprintf("%d KiB", l.block>>10)
	if l.block >= 1<<20 {
		block = fmt.Sprintf("%d MiB", l.block>>20)
	}
	if l.nbdcopy {
		return "nbdcopy, 1 connection"
	}
	conns := "connections"
	if l.conns == 1 {
		conns = "connection"
	}
	return fmt.Sprintf("%s %s, depth %d, %d %s", ways[l.way], block, l.depth, l.conns, conns)
}

// rawTable is the raw file in the page cache, served by everybody.
func (b *bench) rawTable() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	t := &table{Name: "raw file in the page cache"}
	t.Servers = []*server{
		b.server("tidemark", self, "-serve", b.raw, "-socket"),
		b.server("qemu-nbd", "qemu-nbd", "-f", "raw", "-t", "-e", "16", "--cache=writeback", "--aio=io_uring", b.raw, "-k"),
		b.server("nbdkit", "nbdkit", "-f", "file", b.raw, "-U"),
	}
	for _, way := range []string{"randread", "randwrite"} {
		for _, conns := range []int{1, 4} {
			for _, depth := range []int{1, 16, 64} {
				t.add("raw", "", load{way: way, block: 4 << 10, depth: depth, conns: conns})
			}
		}
	}
	for _, way := range []string{"read", "write"} {
		for _, conns := range []int{1, 4} {
			t.add("raw", "", load{way: way, block: 1 << 20, depth: 4, conns: conns})
		}
	}
	t.add("raw", "", load{nbdcopy: true, block: 256 << 10})
	b.addTable(t)
	return nil
}

// pointTable is a restore point, beside a compressed qcow2 and the raw file.
func (b *bench) pointTable(ctx context.Context, binary string) error {
	t := &table{Name: "restore point"}
	for _, state := range []string{cold, warm} {
		l := load{area: warmBytes, conns: 1}
		if state == cold {
			l.area, l.count = 0, coldReads
		}
		for _, depth := range []int{1, 16} {
			for _, block := range []int{4 << 10, 64 << 10} {
				l := l
				l.way, l.block, l.depth = "randread", block, depth
				t.add("point", state, l)
			}
		}
		l.way, l.block, l.depth = "read", 1<<20, 4
		l.count = min(l.count, b.size/int64(l.block))
		t.add("point", state, l)
	}
	if b.addTable(t); len(t.Rows) == 0 {
		return nil
	}
	repo, err := b.keep(ctx, binary)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	point := b.server("tidemark", binary, "export", "vm@latest", "--quiet", "-r", repo, "--socket")
	point.cold = []string{repo}
	qcow2 := b.server("qemu-nbd qcow2", "qemu-nbd", "-f", "qcow2", "-r", "-t", "-e", "16", "--cache=writeback", "--aio=io_uring", b.qcow2, "-k")
	qcow2.cold = []string{b.qcow2}
	t.Servers = []*server{point, qcow2, b.server("tidemark raw", self, "-serve", b.raw, "-socket")}
	return nil
}

func (t *table) add(name, state string, l load) {
	if state != "" {
		name += " " + state
	}
	t.Rows = append(t.Rows, &row{Name: name + ": " + l.String(), load: l, state: state})
}

// addTable takes the rows that are wanted, if there are any.
func (b *bench) addTable(t *table) {
	rows := t.Rows[:0]
	for _, r := range t.Rows {
		if b.wanted(r.Name) {
			rows = append(rows, r)
		}
	}
	if t.Rows = rows; len(rows) > 0 {
		b.tables = append(b.tables, t)
	}
}

// server prepares one; the last argument, its socket, is added.
func (b *bench) server(name string, args ...string) *server {
	s := &server{Name: name, socket: filepath.Join(b.dir, fmt.Sprintf("%d.sock", b.sockets))}
	b.sockets++
	s.args = slices.Concat(args, []string{s.socket})
	s.Command = measure.Process{Path: s.args[0], Args: s.args[1:]}.String()
	return s
}
