package kernel

import (
	"context"
	"io"
	"iter"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
)

// disk is a file that can be watched, and held up.
type disk struct {
	*os.File
	size  int64
	syncs atomic.Int64
	hang  atomic.Pointer[chan struct{}] // reads wait for it to be closed
	reads atomic.Int64
}

var _ restore.WritableDisk = (*disk)(nil)

func newDisk(t *testing.T, size int64) *disk {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return &disk{File: f, size: size}
}

func (d *disk) Size() int64 { return d.size }

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.reads.Add(1)
	if c := d.hang.Load(); c != nil {
		<-*c
	}
	return d.File.ReadAt(p, off)
}

func (d *disk) Zero(off, n int64) error {
	_, err := d.WriteAt(make([]byte, n), off)
	return err
}

func (d *disk) Trim(off, n int64) error { return d.Zero(off, n) }

func (d *disk) Sync() error { d.syncs.Add(1); return nil }

func (d *disk) Extents(_ context.Context, off, n int64) iter.Seq2[restore.Extent, error] {
	return func(yield func(restore.Extent, error) bool) {
		if n = min(n, d.size-off); n > 0 {
			yield(restore.Extent{Off: off, Len: n}, nil)
		}
	}
}

// server serves a disk on a unix socket, and can be killed.
type server struct {
	t      *testing.T
	socket string
	kill   func() // cuts all connections at once, without an answer
}

func serve(t *testing.T, d restore.Disk) *server {
	t.Helper()
	s := &server{t: t, socket: filepath.Join(t.TempDir(), "s")}
	s.start(d)
	return s
}

func (s *server) start(d restore.Disk) {
	s.t.Helper()
	set, err := nbd.NewStatic(nbd.Export{Name: "disk", Disk: d})
	if err != nil {
		s.t.Fatal(err)
	}
	l, err := nbd.Listen(s.t.Context(), "unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	cut := &cuttable{Listener: l}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = (&nbd.Server{Exports: set, DrainTimeout: time.Millisecond}).Serve(ctx, cut)
	}()
	var once sync.Once
	s.kill = func() {
		once.Do(func() {
			cut.cut()
			cancel()
			<-done
		})
	}
	s.t.Cleanup(func() { s.kill() })
}

func (s *server) dial(ctx context.Context) (net.Conn, error) {
	return DialURI(nbd.URI{Network: "unix", Address: s.socket})(ctx)
}

// cuttable knows its connections.
type cuttable struct {
	net.Listener
	mu    sync.Mutex
	gone  bool
	conns []net.Conn
}

func (c *cuttable) Accept() (net.Conn, error) {
	n, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns = append(c.conns, n)
	if c.gone {
		_ = n.Close()
	}
	return n, nil
}

func (c *cuttable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	for _, n := range c.conns {
		_ = n.Close()
	}
}

// same compares what the device holds with the file below the server's disk.
func same(t *testing.T, path string, d *disk) {
	t.Helper()
	dev, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dev.Close() }()
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < d.size; off += int64(len(a)) {
		n := min(int64(len(a)), d.size-off)
		_, errA := io.ReadFull(io.NewSectionReader(dev, off, n), a[:n])
		_, errB := d.File.ReadAt(b[:n], off)
		if errA != nil || errB != nil {
			t.Fatalf("%d: %v, %v", off, errA, errB)
		}
		if string(a[:n]) != string(b[:n]) {
			t.Fatalf("device and server differ in the MiB at %d", off)
		}
	}
}
