package qmp_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/internal/qmp"
)

const hello = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}` + "\r\n"

// fakePeer listens for one client and lets serve talk to it.
func fakePeer(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "q")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		serve(conn)
		_ = conn.Close()
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
		_ = os.RemoveAll(dir)
	})
	return sock
}

// send ignores errors: a client that has gone away is part of some tests.
func send(conn net.Conn, text string) { _, _ = io.WriteString(conn, text) }

// negotiated greets, takes the negotiation and hands over to serve.
func negotiated(serve func(conn net.Conn, in *bufio.Reader)) func(net.Conn) {
	return func(conn net.Conn) {
		in := bufio.NewReader(conn)
		send(conn, hello)
		if _, err := in.ReadString('\n'); err != nil {
			return
		}
		send(conn, `{"return": {}, "id": 0}`+"\r\n")
		serve(conn, in)
	}
}

// hangUntilClosed keeps the connection open until the client closes it.
func hangUntilClosed(_ net.Conn, in *bufio.Reader) {
	for {
		if _, err := in.ReadByte(); err != nil {
			return
		}
	}
}

func TestGarbageInsteadOfGreeting(t *testing.T) {
	for name, greeting := range map[string]string{
		"human monitor": "QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ",
		"nothing":       "",
		"event":         `{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}`,
		"array":         `[1, 2]`,
		"cut short":     `{"QMP": {"ver`,
		"wrong types":   `{"QMP": {"version": 7}}`,
		"deep":          strings.Repeat("[", 100000),
		"endless":       `{"QMP": "` + strings.Repeat("x", 5<<20),
	} {
		t.Run(name, func(t *testing.T) {
			sock := fakePeer(t, func(conn net.Conn) { send(conn, greeting) })
			_, err := qmp.Dial(t.Context(), sock, qmp.Options{})
			want := qmp.ErrNotQMP
			if name == "nothing" {
				want = qmp.ErrClosed
			}
			if !errors.Is(err, want) {
				t.Fatalf("got %v, want %v", err, want)
			}
			if name == "endless" && !errors.Is(err, qmp.ErrTooLarge) {
				t.Fatalf("got %v, want ErrTooLarge", err)
			}
		})
	}
}

func TestGarbageAfterNegotiation(t *testing.T) {
	for name, garbage := range map[string]string{
		"text":            "hello\r\n",
		"two in one":      `{"return": {}, "event": "STOP", "id": 1}`,
		"foreign ID":      `{"return": {}, "id": "abc"}`,
		"second greeting": hello,
		"empty":           `{}`,
	} {
		t.Run(name, func(t *testing.T) {
			sock := fakePeer(t, negotiated(func(conn net.Conn, in *bufio.Reader) {
				send(conn, garbage)
				hangUntilClosed(conn, in)
			}))
			c, err := qmp.Dial(t.Context(), sock, qmp.Options{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Status(t.Context())
			if !errors.Is(err, qmp.ErrClosed) || !errors.Is(c.Err(), qmp.ErrNotQMP) {
				t.Fatalf("got %v, Err %v", err, c.Err())
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestErrorReplyWithoutIDIsIgnored(t *testing.T) {
	// QEMU sends one when it could not parse its input; nobody waits for it.
	sock := fakePeer(t, negotiated(func(conn net.Conn, in *bufio.Reader) {
		send(conn, `{"error": {"class": "GenericError", "desc": "JSON parse error"}}`)
		if _, err := in.ReadString('\n'); err == nil {
			send(conn, `{"return": {"status": "running"}, "id": 1}`)
		}
		hangUntilClosed(conn, in)
	}))
	c, err := qmp.Dial(t.Context(), sock, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if s, err := c.Status(t.Context()); err != nil || s != qmp.StatusRunning {
		t.Fatalf("got %q, %v", s, err)
	}
}

func TestRepliesOutOfOrderFindTheirCallers(t *testing.T) {
	sock := fakePeer(t, negotiated(func(conn net.Conn, in *bufio.Reader) {
		for range 2 {
			if _, err := in.ReadString('\n'); err != nil {
				return
			}
		}
		send(conn, `{"return": 2, "id": 2}{"return": 1, "id": 1}`)
		hangUntilClosed(conn, in)
	}))
	c, err := qmp.Dial(t.Context(), sock, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	type answer struct {
		n   int
		err error
	}
	got := make(chan answer, 2)
	for range 2 {
		go func() {
			var a answer
			a.err = c.Execute(t.Context(), "x", nil, &a.n)
			got <- a
		}()
	}
	a, b := <-got, <-got
	if a.err != nil || b.err != nil || a.n+b.n != 3 {
		t.Fatalf("got %+v and %+v", a, b)
	}
}

func TestGivenUpCommandLeavesTheConnectionGood(t *testing.T) {
	late := make(chan struct{})
	sock := fakePeer(t, negotiated(func(conn net.Conn, in *bufio.Reader) {
		if _, err := in.ReadString('\n'); err != nil {
			return
		}
		<-late
		send(conn, `{"return": {"status": "paused"}, "id": 1}`)
		if _, err := in.ReadString('\n'); err != nil {
			return
		}
		send(conn, `{"return": {"status": "running"}, "id": 2}`)
		hangUntilClosed(conn, in)
	}))
	c, err := qmp.Dial(t.Context(), sock, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Status(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, qmp.ErrClosed) {
		t.Fatalf("got %v, want the context's error alone", err)
	}
	close(late)
	if s, err := c.Status(t.Context()); err != nil || s != qmp.StatusRunning {
		t.Fatalf("got %q, %v", s, err)
	}
}

func TestPeerThatDoesNotReadCannotBlockTheCaller(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan struct{})
	defer close(end)
	sock := fakePeer(t, negotiated(func(_ net.Conn, in *bufio.Reader) {
		_, _ = in.ReadByte() // the command has begun
		cancel()
		<-end
	}))
	c, err := qmp.Dial(t.Context(), sock, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	big := map[string]string{"x": strings.Repeat("x", 8<<20)}
	if err := c.Execute(ctx, "x", big, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want the context's error", err)
	}
	// Half a command went out, so the connection is of no use any more.
	select {
	case <-c.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the connection was kept")
	}
	if err := c.Execute(t.Context(), "x", nil, nil); !errors.Is(err, qmp.ErrClosed) {
		t.Fatalf("got %v, want ErrClosed", err)
	}
}

func TestCloseFailsCommandsUnderWay(t *testing.T) {
	sock := fakePeer(t, negotiated(hangUntilClosed))
	c, err := qmp.Dial(t.Context(), sock, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error)
	go func() { got <- c.Stop(t.Context()) }()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; !errors.Is(err, qmp.ErrClosed) {
		t.Fatalf("got %v, want ErrClosed", err)
	}
	if err := c.Close(); err != nil {
		t.Fatalf("second Close: %v", err)
	}
}

func TestEventsBeyondTheBufferAreCounted(t *testing.T) {
	const sent = 1000
	sock := fakePeer(t, negotiated(func(conn net.Conn, in *bufio.Reader) {
		for range sent {
			send(conn, `{"event": "X", "timestamp": {"seconds": 1, "microseconds": 2}}`)
		}
		if _, err := in.ReadString('\n'); err == nil {
			send(conn, `{"return": {}, "id": 1}`)
		}
		hangUntilClosed(conn, in)
	}))
	c, err := qmp.Dial(t.Context(), sock, qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(t.Context()); err != nil { // its answer comes after all events
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	kept := uint64(0)
	for range c.Events() {
		kept++
	}
	if kept == 0 || kept+c.Dropped() != sent {
		t.Fatalf("kept %d, dropped %d of %d", kept, c.Dropped(), sent)
	}
}

func TestDialIsCancelled(t *testing.T) {
	end := make(chan struct{})
	sock := fakePeer(t, func(net.Conn) { <-end })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := qmp.Dial(ctx, sock, qmp.Options{})
	if !errors.Is(err, context.Canceled) || errors.Is(err, qmp.ErrBusy) {
		t.Fatalf("got %v, want Canceled alone", err)
	}
	close(end)
}
