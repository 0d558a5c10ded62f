// Command nbdbench compares Tidemark's NBD server with nbdkit and qemu-nbd: the same
// file, the same clients, in turns, one server at a time under load. It prints a
// table and never fails for being slow.
//
//	go run ./test/bench/nbdbench [-seconds 3] [-rounds 3] [-size 1024] [-dir /dev/shm]
//
// Needed are fio with its nbd engine, nbdcopy, nbdkit and qemu-nbd; what is
// missing is left out. "memory" is our server with a disk that does not lie in a
// file, as restore points and overlays do not.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
)

func main() {
	seconds := flag.Int("seconds", 3, "length of one measurement")
	rounds := flag.Int("rounds", 3, "measurements of each kind; the table shows medians")
	size := flag.Int64("size", 1024, "size of the file in MiB")
	dir := flag.String("dir", "/dev/shm", "where to put the file")
	only := flag.String("only", "", "measure only rows whose name has this in it")
	serve := flag.String("serve", "", "internal: serve -file as file or memory")
	file := flag.String("file", "", "internal")
	socket := flag.String("socket", "", "internal")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if *serve != "" {
		err = serveFile(ctx, *serve, *file, *socket)
	} else {
		err = compare(ctx, *dir, *size<<20, *seconds, *rounds, *only)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// plainFile is a disk in one file.
type plainFile struct {
	*os.File
	size int64
}

func (d plainFile) Size() int64             { return d.size }
func (d plainFile) Trim(off, n int64) error { return d.Zero(off, n) }
func (d plainFile) Zero(off, n int64) error {
	return unix.Fallocate(int(d.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (d plainFile) Extents(_ context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) {
		if n = min(n, d.size-off); n > 0 {
			yield(restore.Extent{Off: off, Len: n}, nil)
		}
	}
}

// sendable is a plainFile that says so.
type sendable struct{ plainFile }

func (d sendable) File(_, _ int64) (uintptr, bool) { return d.Fd(), true }

func serveFile(ctx context.Context, kind, file, socket string) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	var d restore.Disk = plainFile{f, st.Size()}
	if kind == "file" {
		d = sendable{plainFile{f, st.Size()}}
	}
	exports, err := nbd.NewStatic(nbd.Export{Disk: d})
	if err != nil {
		return err
	}
	l, err := nbd.Listen(ctx, "unix", socket)
	if err != nil {
		return err
	}
	return (&nbd.Server{Exports: exports}).Serve(ctx, l)
}

// server is one of those compared.
type server struct {
	name   string
	uri    string
	socket string
	cmd    *exec.Cmd
}

func startServers(ctx context.Context, dir, file string) ([]*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	sock := func(name string) string { return filepath.Join(dir, name+".sock") }
	all := []struct {
		name string
		args []string
	}{
		{"tidemark", []string{self, "-serve", "file", "-file", file, "-socket", sock("tidemark")}},
		{"memory", []string{self, "-serve", "memory", "-file", file, "-socket", sock("memory")}},
		{"nbdkit", []string{"nbdkit", "-f", "-U", sock("nbdkit"), "file", file}},
		{"qemu-nbd", []string{"qemu-nbd", "-f", "raw", "-k", sock("qemu-nbd"), "-t", "-e", "16", "--cache=writeback", "--aio=io_uring", file}},
	}
	var list []*server
	for _, a := range all {
		if _, err := exec.LookPath(a.args[0]); err != nil {
			fmt.Fprintf(os.Stderr, "left out: %v\n", err)
			continue
		}
		s := &server{name: a.name, socket: sock(a.name), uri: "nbd+unix:///?socket=" + sock(a.name)}
		s.cmd = exec.CommandContext(ctx, a.args[0], a.args[1:]...)
		s.cmd.Stderr = os.Stderr
		if err := s.cmd.Start(); err != nil {
			return list, err
		}
		list = append(list, s)
		for i := 0; ; i++ {
			c, err := net.Dial("unix", s.socket)
			if err == nil {
				_ = c.Close() // it answers
				break
			}
			if i == 200 {
				return list, fmt.Errorf("%s does not start: %w", s.name, err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return list, nil
}

// cpu is what a server's process has used so far, in seconds.
func (s *server) cpu() float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	var user, system float64
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		return 0
	}
	return (user + system) / 100
}

type row struct {
	name string
	unit string
	run  func(ctx context.Context, s *server) (float64, error)
}

func fio(seconds int, field string, scale float64, args ...string) func(context.Context, *server) (float64, error) {
	return func(ctx context.Context, s *server) (float64, error) {
		args := append([]string{"--name=x", "--ioengine=nbd", "--uri=" + s.uri, "--time_based", "--ramp_time=1",
			fmt.Sprintf("--runtime=%d", seconds), "--output-format=json"}, args...)
		out, err := exec.CommandContext(ctx, "fio", args...).Output()
		if err != nil {
			return 0, err
		}
		var r struct {
			Jobs []map[string]json.RawMessage
		}
		// fio prints notes before the JSON.
		if i := strings.IndexByte(string(out), '{'); i > 0 {
			out = out[i:]
		}
		if err := json.Unmarshal(out, &r); err != nil || len(r.Jobs) == 0 {
			return 0, fmt.Errorf("fio: no result: %w", err)
		}
		var total float64
		for _, way := range []string{"read", "write"} {
			var v map[string]any
			if err := json.Unmarshal(r.Jobs[0][way], &v); err != nil {
				return 0, err
			}
			if f, ok := v[field].(float64); ok {
				total += f
			}
		}
		return total / scale, nil
	}
}

func nbdcopy(size int64) func(context.Context, *server) (float64, error) {
	return func(ctx context.Context, s *server) (float64, error) {
		start := time.Now()
		err := exec.CommandContext(ctx, "nbdcopy", "--connections=1", s.uri, "null:").Run()
		return float64(size) / 1e6 / time.Since(start).Seconds(), err
	}
}

func compare(ctx context.Context, dir string, size int64, seconds, rounds int, only string) (err error) {
	dir, err = os.MkdirTemp(dir, "tidemark-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	file := filepath.Join(dir, "disk")
	if err := fill(file, size); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	servers, err := startServers(ctx, dir, file)
	defer func() {
		cancel()
		for _, s := range servers {
			_ = s.cmd.Wait() // killed
		}
	}()
	if err != nil {
		return err
	}
	rows := []row{
		{"random read 4 KiB, depth 1", "kIOPS", fio(seconds, "iops", 1000, "--rw=randread", "--bs=4k", "--iodepth=1")},
		{"random read 4 KiB, depth 16", "kIOPS", fio(seconds, "iops", 1000, "--rw=randread", "--bs=4k", "--iodepth=16")},
		{"random write 4 KiB, depth 1", "kIOPS", fio(seconds, "iops", 1000, "--rw=randwrite", "--bs=4k", "--iodepth=1")},
		{"random write 4 KiB, depth 16", "kIOPS", fio(seconds, "iops", 1000, "--rw=randwrite", "--bs=4k", "--iodepth=16")},
		{"sequential read 256 KiB, depth 4", "MB/s", fio(seconds, "bw_bytes", 1e6, "--rw=read", "--bs=256k", "--iodepth=4")},
		{"sequential write 256 KiB, depth 4", "MB/s", fio(seconds, "bw_bytes", 1e6, "--rw=write", "--bs=256k", "--iodepth=4")},
		{"nbdcopy, 1 connection", "MB/s", nbdcopy(size)},
	}
	type cell struct{ value, cpu []float64 }
	cells := make([][]cell, len(rows))
	for i := range rows {
		cells[i] = make([]cell, len(servers))
	}
	for round := range rounds {
		for i, r := range rows {
			if !strings.Contains(r.name, only) {
				continue
			}
			for k := range servers {
				j := (k + round) % len(servers) // nobody is always first
				s := servers[j]
				before := s.cpu()
				v, err := r.run(ctx, s)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", r.name, s.name, err)
				}
				cells[i][j].value = append(cells[i][j].value, v)
				cells[i][j].cpu = append(cells[i][j].cpu, s.cpu()-before)
			}
			fmt.Fprintf(os.Stderr, "round %d: %s\n", round+1, r.name)
		}
	}
	lines := []string{fmt.Sprintf("medians of %d (server CPU s)\t", rounds)}
	for _, s := range servers {
		lines[0] += "\t" + s.name
	}
	for i, r := range rows {
		if len(cells[i][0].value) == 0 {
			continue
		}
		line := r.name + "\t" + r.unit
		for _, c := range cells[i] {
			line += fmt.Sprintf("\t%.1f (%.1f)", median(c.value), median(c.cpu))
		}
		lines = append(lines, line)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	if _, err := io.WriteString(w, strings.Join(lines, "\n")+"\n"); err != nil {
		return err
	}
	return w.Flush()
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// fill makes the file, all of it data.
func fill(file string, size int64) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i*7 + i>>8)
	}
	for off := int64(0); off < size; off += int64(len(block)) {
		if _, err := f.WriteAt(block, off); err != nil {
			return err
		}
	}
	_, err = io.Copy(io.Discard, io.NewSectionReader(f, 0, size))
	return err
}
