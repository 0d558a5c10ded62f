package nbd

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// unixPair is both ends of a unix socket, the first of them blocking.
func unixPair(t *testing.T, s *Server, timeout time.Duration) (*unixConn, *net.UnixConn) {
	t.Helper()
	l, err := Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	nc, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	u := &unixConn{Conn: nc, busiest: &s.busiest}
	if err := u.block(timeout); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	return u, client.(*net.UnixConn)
}

// soon runs f, which must end by itself.
func soon(t *testing.T, what string, f func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(10 * time.Second):
		t.Fatalf("%s does not end", what)
		return nil
	}
}

func TestBlockingReadIsWoken(t *testing.T) {
	for name, c := range map[string]struct {
		wake func(u *unixConn, client *net.UnixConn) error
		want error
	}{
		"deadline":         {func(u *unixConn, _ *net.UnixConn) error { return u.SetReadDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
		"close":            {func(u *unixConn, _ *net.UnixConn) error { return u.Close() }, io.EOF},
		"client goes":      {func(_ *unixConn, c *net.UnixConn) error { return c.Close() }, io.EOF},
		"client ends half": {func(_ *unixConn, c *net.UnixConn) error { return c.CloseWrite() }, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			u, client := unixPair(t, &Server{}, time.Minute)
			go func() {
				time.Sleep(20 * time.Millisecond)
				if err := c.wake(u, client); err != nil {
					t.Error(err)
				}
			}()
			err := soon(t, "Read", func() error { _, err := u.Read(make([]byte, 1)); return err })
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestBlockingWriteEnds(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(u *unixConn) error
		want error
	}{
		"deadline": {func(u *unixConn) error { return u.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)) }, os.ErrDeadlineExceeded},
		"close": {func(u *unixConn) error {
			time.AfterFunc(50*time.Millisecond, func() { _ = u.Close() })
			return nil
		}, unix.EPIPE},
	} {
		t.Run(name, func(t *testing.T) {
			u, _ := unixPair(t, &Server{}, 100*time.Millisecond)
			if err := c.end(u); err != nil {
				t.Fatal(err)
			}
			err := soon(t, "Write", func() error { _, err := u.Write(make([]byte, 64<<20)); return err })
			if !errors.Is(err, c.want) && !errors.Is(err, net.ErrClosed) { // closed before it began
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

// The descriptor is freed after its last user, and nothing reaches whoever gets its number next.
func TestClosedSocketIsLeftAlone(t *testing.T) {
	u, _ := unixPair(t, &Server{}, time.Minute)
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstat(u.fd, &unix.Stat_t{}); !errors.Is(err, unix.EBADF) {
		t.Errorf("descriptor is open: %v", err)
	}
	if _, err := u.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read: %v", err)
	}
	if _, err := u.Write(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write: %v", err)
	}
	if err := u.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Errorf("SetReadDeadline: %v", err)
	}
	if err := u.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Close: %v", err)
	}
}

func TestOnlyTheBusiestSpins(t *testing.T) {
	s := &Server{}
	u, client := unixPair(t, s, time.Minute)
	other, otherClient := unixPair(t, s, time.Minute)
	say := func(u *unixConn, c *net.UnixConn) {
		t.Helper()
		if _, err := c.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if _, err := u.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	for range spinAfter + 1 {
		say(u, client)
	}
	u.gap = 0
	begin := time.Now()
	if u.spin(begin); time.Since(begin) < spinTime {
		t.Error("the only one did not spin")
	}
	say(other, otherClient)
	if s.busiest.Load() != other {
		t.Error("the other was not noticed")
	}
	say(u, client)
	if u.alone != 0 {
		t.Errorf("alone for %d reads after another's", u.alone)
	}
}

// A large write goes through the pipe however it comes, and whatever is read ahead.
func TestSplicedWritesComeInAnyPieces(t *testing.T) {
	const off, n = 12345, 300<<10 + 77
	want := pattern(n, 9)
	for name, piece := range map[string]int{"whole": n, "odd": 7777, "small": 13} {
		t.Run(name, func(t *testing.T) {
			d := newFileDisk(t, diskSize)
			p := serveDisk(t, d, false)
			if piece < 100 { // fills the pipe's slots, not the pipe
				want = want[:smallWrite+100]
			}
			for round := range uint64(2) { // the second is not read ahead
				p.request(0, cmdWrite, round, off, uint32(len(want)), "")
				for rest := want; len(rest) > 0; {
					k := min(piece, len(rest))
					p.put(string(rest[:k]))
					rest = rest[k:]
				}
				p.getSimple(0).want(t, round, 0)
				got := make([]byte, len(want))
				if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("round %d: the disk has something else, %v", round, err)
				}
				if err := d.Zero(0, diskSize); err != nil {
					t.Fatal(err)
				}
			}
			p.request(0, cmdRead, 9, 0, 512)
			p.getSimple(512).want(t, 9, 0)
		})
	}
}

// counted counts what does not come through the pipe.
type counted struct {
	*fileDisk
	calls atomic.Int64
}

func (d *counted) WriteAt(p []byte, off int64) (int, error) {
	d.calls.Add(1)
	return d.fileDisk.WriteAt(p, off)
}

// After a large write no more than the next request's head is read ahead, however long that is.
func TestNothingOfASplicedWriteIsReadAhead(t *testing.T) {
	forms(t, func(t *testing.T, h headers) {
		d := &counted{fileDisk: newFileDisk(t, diskSize)}
		p := serveAs(t, d, h)
		var before int64
		for round := range uint64(4) {
			want := pattern(300<<10+77, byte(round))
			p.request(0, cmdWrite, round, 12345, uint32(len(want)), want)
			p.answer(0, 0).want(t, round, 0)
			got := make([]byte, len(want))
			if _, err := d.ReadAt(got, 12345); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("round %d: the disk has something else, %v", round, err)
			}
			if now := d.calls.Load(); round == 0 {
				before = now
			} else if now != before {
				t.Errorf("round %d: %d pieces were read ahead", round, now-before)
			}
		}
	})
}

// A large payload that nobody wants is not taken by the size of a head.
func TestDrainingTakesFewReads(t *testing.T) {
	reads := 0
	in := input{from: readerFunc(func(p []byte) (int, error) { reads++; return len(p), nil }),
		buf: make([]byte, inputBuffer), head: requestLength, before: func() error { return nil }}
	in.expect(true)
	if err := in.drain(maxPayload); err != nil || reads > maxPayload/inputBuffer {
		t.Errorf("%d reads, %v", reads, err)
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// sealed is a file disk whose file takes no writes from the kernel.
type sealed struct {
	*fileDisk
	fd       uintptr
	fallback error // of WriteAt
}

func (d sealed) WriteFile(off, _ int64) (uintptr, int64, bool) { return d.fd, off, true }

func (d sealed) WriteAt(p []byte, off int64) (int, error) {
	if d.fallback != nil {
		return 0, d.fallback
	}
	return d.fileDisk.WriteAt(p, off)
}

func TestSplicedWriteThatFails(t *testing.T) {
	for name, failure := range map[string]error{"WriteAt works": nil, "WriteAt fails too": unix.ENOSPC} {
		t.Run(name, func(t *testing.T) {
			f := newFileDisk(t, diskSize)
			ro, err := os.Open(f.f.Name()) // writing to it is EBADF
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = ro.Close() }()
			p := serveDisk(t, sealed{f, ro.Fd(), failure}, false)
			want := pattern(2<<20, 5)
			errno := errnoOf(failure)
			// The second of the short ones is in the pipe as a whole when the file refuses it.
			for i, n := range []int{100 << 10, 100 << 10, len(want), len(want)} {
				p.request(0, cmdWrite, uint64(i), 4096, uint32(n), string(want[:n]))
				p.getSimple(0).want(t, uint64(i), errno)
				if got := make([]byte, n); failure == nil {
					if _, err := f.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want[:n]) {
						t.Errorf("write %d: the disk has something else, %v", i, err)
					}
					if err := f.Zero(0, diskSize); err != nil {
						t.Fatal(err)
					}
				}
			}
			if failure == nil {
				return
			}
			p.request(0, cmdRead, 9, 4096, uint32(len(want)))
			got := p.getSimple(len(want))
			got.want(t, 9, 0)
		})
	}
}

// Neither a client that leaves nor a server that stops in the middle of a payload is waited for.
func TestSplicedWriteThatIsCutOff(t *testing.T) {
	for name, leave := range map[string]func(p *peer, stop func()){
		"client goes":  func(p *peer, _ func()) { _ = p.Close() },
		"server stops": func(_ *peer, stop func()) { stop() },
	} {
		t.Run(name, func(t *testing.T) {
			s := &Server{Exports: static(t, Export{Disk: newFileDisk(t, diskSize)})}
			socket, stop := start(t, s)
			p := dial(t, "unix", socket)
			p.enter("", false)
			for i := range uint64(2) {
				p.request(0, cmdWrite, i, 0, 1<<20, string(make([]byte, 1<<20)))
				p.getSimple(0).want(t, i, 0)
			}
			p.request(0, cmdWrite, 3, 0, 1<<20, string(make([]byte, 100<<10)))
			time.Sleep(20 * time.Millisecond)
			leave(p, stop)
			eventually(t, "the connection ends", func() bool { return connections(s) == 0 })
		})
	}
}
