package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
)

// errNoQemuImg is wrapped when a format is asked for that qemu-img has to make.
var errNoQemuImg = errors.New("qemu-img is not installed")

// diskFormats are the formats that disks can be restored to, with what qemu-img is told to
// make them.
var diskFormats = map[string][]string{
	"raw":   {},
	"qcow2": {"-O", "qcow2", "-o", "compat=1.1", "-W"},
	"vmdk":  {"-O", "vmdk", "-o", "subformat=streamOptimized"},
	"vhdx":  {"-O", "vhdx", "-o", "subformat=dynamic"},
}

// formatOf is the format that the name of a file stands for.
func formatOf(file string) string {
	ext := strings.ToLower(strings.TrimPrefix(filepath.Ext(file), "."))
	if diskFormats[ext] == nil {
		return "raw"
	}
	return ext
}

// convert writes d as an image of another format. qemu-img reads it over a socket of its
// own. The file gets its name when it is complete and durable.
func convert(ctx context.Context, d restore.Disk, format, target string, o restore.WriteOptions) (_ restore.WriteResult, err error) {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		return restore.WriteResult{}, fmt.Errorf("--format %s: %w", format, errNoQemuImg)
	}
	if err := mayMake(target, o.Force); err != nil {
		return restore.WriteResult{}, err
	}
	if o.Force {
		if real, err := filepath.EvalSymlinks(target); err == nil {
			target = real
		}
	}
	src, err := serveOnce(ctx, d)
	if err != nil {
		return restore.WriteResult{}, err
	}
	defer func() { err = errors.Join(err, src.close()) }()
	f, err := os.CreateTemp(filepath.Dir(target), "."+filepath.Base(target)+".partial-*")
	if err != nil {
		return restore.WriteResult{}, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if rerr := os.Remove(f.Name()); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	args := append(append([]string{"convert", "-p", "-f", "raw"}, diskFormats[format]...), src.uri, f.Name())
	if err := qemuImg(ctx, tool, args, d.Size(), o.Progress); err != nil {
		return restore.WriteResult{}, errors.Join(src.failure(), err)
	}
	if err := f.Sync(); err != nil {
		return restore.WriteResult{}, err
	}
	if o.ReadBack {
		if err := qemuImg(ctx, tool, []string{"compare", "-p", "-f", "raw", "-F", format, src.uri, f.Name()}, d.Size(), o.ReadingBack); err != nil {
			return restore.WriteResult{}, errors.Join(src.failure(), fmt.Errorf("%w: %w", restore.ErrReadBack, err))
		}
	}
	r, err := measure(ctx, d)
	if err != nil {
		return restore.WriteResult{}, err
	}
	return r, restore.Publish(f.Name(), target, o.Force)
}

// mayMake tells early whether a file can get its name.
func mayMake(target string, force bool) error {
	st, err := os.Stat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s: only a raw disk can be written to what is no plain file", target)
	case !force:
		return &os.PathError{Op: "restore", Path: target, Err: os.ErrExist}
	}
	return nil
}

// measure counts a disk's data and zeroes.
func measure(ctx context.Context, d restore.Disk) (r restore.WriteResult, err error) {
	for e, err := range d.Extents(ctx, 0, d.Size()) {
		if err != nil {
			return r, err
		}
		if e.Zero {
			r.Zero += e.Len
		} else {
			r.Data += e.Len
		}
	}
	r.Written = r.Data
	return r, nil
}

var percentage = regexp.MustCompile(`\(([0-9.]+)/100%\)`)

// qemuImg runs qemu-img and passes its progress on.
func qemuImg(ctx context.Context, tool string, args []string, total int64, progress func(done, total int64)) error {
	cmd := exec.CommandContext(ctx, tool, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	said := ""
	lines := bufio.NewScanner(out)
	lines.Split(scanReturns)
	for lines.Scan() {
		m := percentage.FindStringSubmatch(lines.Text())
		if m == nil {
			said += lines.Text() + "\n"
			continue
		}
		if p, err := strconv.ParseFloat(m[1], 64); err == nil && progress != nil {
			progress(int64(p/100*float64(total)), total)
		}
	}
	_, _ = io.Copy(io.Discard, out) // a line that is too long must not block it
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("qemu-img %s: %w: %s", args[0], err, strings.TrimSpace(said+stderr.String()))
	}
	return nil
}

// scanReturns splits at carriage returns and ends of lines.
func scanReturns(data []byte, atEOF bool) (advance int, token []byte, err error) {
	if i := bytes.IndexAny(data, "\r\n"); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

// served is a disk on a unix socket that only this user can reach.
type served struct {
	uri  string
	dir  string
	disk *tellingDisk
	stop context.CancelFunc
	done chan error
}

func serveOnce(ctx context.Context, d restore.Disk) (_ *served, err error) {
	dir, err := os.MkdirTemp("", "tidemark-restore-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	s := &served{dir: dir, disk: &tellingDisk{Disk: d}, done: make(chan error, 1)}
	exports, err := nbd.NewStatic(nbd.Export{Name: "disk", Disk: s.disk, ReadOnly: true})
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "nbd")
	l, err := nbd.Listen(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	s.uri = "nbd+unix:///disk?socket=" + socket
	ctx, s.stop = context.WithCancel(ctx)
	srv := &nbd.Server{Exports: exports, Log: slog.New(slog.DiscardHandler)}
	go func() { s.done <- srv.Serve(ctx, l) }()
	return s, nil
}

func (s *served) close() error {
	s.stop()
	err := <-s.done
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// failure is why the disk could not be read: qemu-img only learns that it could not.
func (s *served) failure() error {
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	return s.disk.err
}

// tellingDisk remembers the first error of its reads.
type tellingDisk struct {
	restore.Disk
	mu  sync.Mutex
	err error
}

func (d *tellingDisk) ReadAt(p []byte, off int64) (int, error) {
	return d.ReadAtContext(context.Background(), p, off)
}

func (d *tellingDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	if r, ok := d.Disk.(restore.ReaderAtContext); ok {
		n, err = r.ReadAtContext(ctx, p, off)
	} else {
		n, err = d.Disk.ReadAt(p, off)
	}
	if err != nil && !errors.Is(err, io.EOF) && ctx.Err() == nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.err == nil {
			d.err = err
		}
	}
	return n, err
}
