package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// dialFrom connects over TCP from another address of this host, which makes it
// another client.
func dialFrom(t testing.TB, from, address string) *peer {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	p := &peer{t: t, Conn: c}
	p.deadline(20 * time.Second)
	return p
}

func startTCP(t testing.TB, s *Server) (address string) {
	t.Helper()
	l, err := Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	startListener(t, s, l)
	return l.Addr().String()
}

func TestClientsAreToldApart(t *testing.T) {
	for want, c := range map[string]Client{
		"uid 1000":        {Network: "unix", Unix: &Credentials{UID: 1000, GID: 1, PID: 7}},
		"192.0.2.1":       {Network: "tcp", Address: "192.0.2.1:4711"},
		"192.0.2.2":       {Network: "tcp", Address: "[::ffff:192.0.2.2]:4711"},
		"2001:db8:1::/64": {Network: "tcp", Address: "[2001:db8:1::abcd]:4711"},
		"fe80::/64":       {Network: "tcp", Address: "[fe80::1%eth0]:4711"},
		"unix":            {Network: "unix"},
	} {
		if got := c.key(); got != want {
			t.Errorf("%+v is %q, want %q", c, got, want)
		}
	}
}

func TestUndecidedConnectionsMakePlace(t *testing.T) {
	s := twoExports(t)
	s.MaxConnections, s.MaxPerClient = 6, 4
	log := &lines{}
	s.Log = slog.New(slog.NewTextHandler(log, nil))
	address := startTCP(t, s)
	good := dialFrom(t, "127.0.0.1", address)
	good.enter("a", false)
	var silent []*peer
	for range 5 { // one more than it may
		silent = append(silent, dialFrom(t, "127.0.0.2", address))
		silent[len(silent)-1].get(18)
	}
	silent[0].wantClosed() // its own oldest
	if n := connections(s); n != 5 {
		t.Errorf("%d connections", n)
	}
	eventually(t, "it is logged", func() bool { return strings.Contains(log.String(), errCrowdedOut.Error()) })
	second := dialFrom(t, "127.0.0.3", address)
	second.enter("a", false)
	third := dialFrom(t, "127.0.0.4", address) // the server is full
	third.enter("a", false)
	silent[1].wantClosed()
	for i := range uint64(3) {
		dialFrom(t, "127.0.0.5", address).enter("b", false)
		silent[2+i].wantClosed()
	}
	// Nobody is undecided now, so nobody makes place.
	dialFrom(t, "127.0.0.6", address).wantClosed()
	for i, p := range []*peer{good, second, third} {
		p.request(0, cmdRead, uint64(i), 0, 1)
		p.getSimple(1).want(t, uint64(i), 0)
	}
}

func TestOneClientGetsSoManyConnections(t *testing.T) {
	s := twoExports(t)
	s.MaxPerClient = 3
	address := startTCP(t, s)
	for range 3 {
		dialFrom(t, "127.0.0.2", address).enter("a", false)
	}
	dialFrom(t, "127.0.0.2", address).wantClosed()
	dialFrom(t, "127.0.0.3", address).enter("a", false)
}

func TestHalfARequestIsNotWaitedForForever(t *testing.T) {
	request := wire(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0))
	for name, said := range map[string][]byte{
		"half a head":          request,
		"half a small payload": wire(request, uint32(4096), make([]byte, 100)),
		"half a large payload": wire(request, uint32(1<<20), make([]byte, 300<<10)),
		"no payload":           wire(request, uint32(100)),
		"a refused payload":    wire(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(1<<40), uint32(1<<20), "x"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			log := &lines{}
			s := &Server{Exports: static(t, Export{Disk: newMemDisk(diskSize)}), RequestTimeout: 100 * time.Millisecond, Log: slog.New(slog.NewTextHandler(log, nil))}
			socket, stop := start(t, s)
			p := dial(t, "unix", socket)
			p.enter("", false)
			p.put(said)
			begin := time.Now()
			p.wantClosed()
			if d := time.Since(begin); d < s.RequestTimeout {
				t.Errorf("hung up after %v", d)
			}
			stop()
			if !strings.Contains(log.String(), ErrRequestTimeout.Error()) {
				t.Errorf("log: %s", log)
			}
		})
	}
}

func TestSlowDisksAndSilentClientsAreWaitedFor(t *testing.T) {
	d := &hooked{WritableDisk: newMemDisk(diskSize), write: func(int64, int) error { time.Sleep(300 * time.Millisecond); return nil }}
	s := &Server{Exports: static(t, Export{Disk: d}), RequestTimeout: 50 * time.Millisecond}
	socket, _ := start(t, s)
	p := dial(t, "unix", socket)
	p.enter("", false)
	p.request(0, cmdWrite, 1, 0, 100, make([]byte, 100))
	p.getSimple(0).want(t, 1, 0)
	time.Sleep(300 * time.Millisecond)
	// A client on a slow line, which gets on.
	p.put(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(2), uint64(0), uint32(1<<20))
	for range 16 {
		time.Sleep(20 * time.Millisecond)
		p.put(make([]byte, 64<<10))
	}
	p.getSimple(0).want(t, 2, 0)
}

func TestIdleClientsAreCutOffWhereThatIsWanted(t *testing.T) {
	d := &hooked{WritableDisk: newMemDisk(diskSize), zero: func() error { time.Sleep(300 * time.Millisecond); return nil }}
	s := &Server{Exports: static(t, Export{Disk: d}), IdleTimeout: 100 * time.Millisecond}
	socket, _ := start(t, s)
	p := dial(t, "unix", socket)
	p.enter("", false)
	p.request(0, cmdWriteZeroes, 1, 0, 4096)
	p.getSimple(0).want(t, 1, 0) // who waits for an answer is not idle
	for i := range uint64(10) {
		time.Sleep(30 * time.Millisecond)
		p.request(0, cmdRead, i, 0, 1)
		p.getSimple(1).want(t, i, 0)
	}
	begin := time.Now()
	p.wantClosed()
	if d := time.Since(begin); d < s.IdleTimeout {
		t.Errorf("hung up after %v", d)
	}
}

func newShares(requests int, bytes int64) *shares {
	return &shares{maxConns: 100, maxPerClient: 100, maxRequests: requests, maxBytes: bytes, of: map[string]*share{}}
}

func (s *shares) client(name string) *share {
	c := &conn{client: Client{Network: name}}
	if _, ok := s.admit(c); !ok {
		panic("no place")
	}
	return c.share
}

func TestSharesLeaveSomethingForTheNext(t *testing.T) {
	s := newShares(100, 900)
	take := func(sh *share, n int64) (got int64) {
		for s.tryAcquire(sh, n) {
			got += n
		}
		return got
	}
	a, b, c := s.client("a"), s.client("b"), s.client("c")
	if got := take(a, 10); got != 450 {
		t.Errorf("the first got %d", got)
	}
	if got := take(b, 10); got != 220 && got != 230 {
		t.Errorf("the second got %d", got)
	}
	if got := take(c, 10); got < 100 {
		t.Errorf("the third got %d", got)
	}
	// Requests without memory are limited as well.
	s = newShares(10, 900)
	a, b = s.client("a"), s.client("b")
	take = func(sh *share, _ int64) (got int64) {
		for s.tryAcquire(sh, 0) {
			got++
		}
		return got
	}
	if got := take(a, 0); got != 5 {
		t.Errorf("the first runs %d", got)
	}
	if got := take(b, 0); got == 0 {
		t.Error("the second runs none")
	}
}

func TestWhoHoldsLeastIsServedFirst(t *testing.T) {
	s := newShares(100, 100)
	hog, other := s.client("hog"), s.client("other")
	for s.tryAcquire(hog, 10) {
	}
	var order []string
	var mu sync.Mutex
	var wait sync.WaitGroup
	queue := func(name string, sh *share, n int64) {
		before := s.waiting
		wait.Go(func() {
			if err := s.acquire(t.Context(), sh, n); err != nil {
				t.Error(err)
			}
			mu.Lock()
			order = append(order, name)
			mu.Unlock()
			time.Sleep(20 * time.Millisecond)
			s.release(sh, n)
		})
		eventually(t, name+" waits", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.waiting > before })
	}
	queue("hog", hog, 10)
	queue("hog", hog, 10)
	queue("other", other, 60) // more than is free
	if s.tryAcquire(hog, 1) {
		t.Error("a small request of the same client overtakes")
	}
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() { gone <- s.acquire(ctx, other, 60) }()
	eventually(t, "four wait", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.waiting == 4 })
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for range 5 {
		s.release(hog, 10)
		eventually(t, "the other is served", func() bool { mu.Lock(); defer mu.Unlock(); return len(order) > 0 })
	}
	wait.Wait()
	if order[0] != "other" || s.bytes != 0 || s.requests != 0 || s.waiting != 0 {
		t.Errorf("order %q, left %d bytes, %d requests, %d waiting", order, s.bytes, s.requests, s.waiting)
	}
}

// What the requests of all connections hold stays within the limits, and every
// request is executed.
func TestMemoryOfAllConnectionsIsBounded(t *testing.T) {
	var now, most, running, mostRunning atomic.Int64
	rise := func(v, most *atomic.Int64, by int64) {
		for n := v.Add(by); ; {
			m := most.Load()
			if n <= m || most.CompareAndSwap(m, n) {
				return
			}
		}
	}
	d := &hooked{WritableDisk: newMemDisk(64 << 20), read: func(_ int64, n int) error {
		rise(&now, &most, int64(n))
		rise(&running, &mostRunning, 1)
		time.Sleep(2 * time.Millisecond)
		now.Add(int64(-n))
		running.Add(-1)
		return nil
	}}
	s := &Server{Exports: static(t, Export{Disk: d}), MaxMemory: 1, MaxRequests: 10} // as little as there may be
	address := startTCP(t, s)
	const conns, each = 6, 12
	var wait sync.WaitGroup
	for i := range conns {
		p := dialFrom(t, fmt.Sprintf("127.0.0.%d", 1+i/2), address)
		p.enter("", false) // simple replies: a read is held in one piece
		wait.Go(func() {
			go func() {
				for j := range uint64(each) {
					_, _ = p.Write(wire(uint32(magicRequest), uint16(0), uint16(cmdRead), j, uint64(0), uint32(8<<20)))
				}
			}()
			for range each {
				if a := p.getSimple(8 << 20); a.errno != 0 {
					t.Error(a.errno)
				}
			}
		})
	}
	wait.Wait()
	if m := most.Load(); m > 64<<20 || m < 16<<20 {
		t.Errorf("%d MiB were read at once", m>>20)
	}
	if m := mostRunning.Load(); m > 10+conns || m < 3 {
		t.Errorf("%d requests were executed at once", m)
	}
	eventually(t, "all is given back", func() bool {
		s.shares.mu.Lock()
		defer s.shares.mu.Unlock()
		return s.shares.bytes == 0 && s.shares.requests == 0
	})
}
