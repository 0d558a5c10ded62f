package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// attackEnv tells this program, when a test starts it again, whom to attack: an address,
// how many clients, and how many addresses they come from.
const attackEnv = "TIDEMARK_TEST_ATTACK"

// stalls are the moments at which a client can stop: what it has said, and how
// many bytes it has waited for before the last piece.
var stalls = []struct {
	name string
	say  func(c net.Conn) error
}{
	{"says nothing", func(net.Conn) error { return nil }},
	{"half a hello", say("\x00\x00")},
	{"half an option", say(string(wire(uint32(3), "IHAVEOPT", uint32(optGo), uint32(100), "abc")))},
	{"half a TLS handshake", func(c net.Conn) error {
		if err := say(string(wire(uint32(3), "IHAVEOPT", uint32(optStartTLS), uint32(0))))(c); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, make([]byte, 18+20)); err != nil {
			return err
		}
		return say("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")(c) // the head of a ClientHello
	}},
	{"half a request", say(string(enter(wire(uint32(magicRequest), uint16(0), uint16(cmdRead)))))},
	{"half a payload", say(string(enter(wire(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0), uint32(1<<20), make([]byte, 300<<10)))))},
	{"takes no replies", say(string(enter(reads(4, 8<<20))))},
	{"takes no small replies", say(string(enter(reads(8000, 4<<10))))},
}

func say(what string) func(net.Conn) error {
	return func(c net.Conn) error {
		_, err := io.WriteString(c, what)
		return err
	}
}

// enter is what a client says that goes on in the transmission phase.
func enter(then []byte) []byte {
	return wire(uint32(3), "IHAVEOPT", uint32(optGo), uint32(7), goData("a"), then)
}

func reads(count int, length uint32) (b []byte) {
	for i := range count {
		b = wire(b, uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(i), uint64(0), length)
	}
	return b
}

// TestAttackers is not a test but the other side of one, in a process of its own.
func TestAttackers(t *testing.T) {
	var address string
	var count, hosts int
	if n, _ := fmt.Sscanf(os.Getenv(attackEnv), "%s %d %d", &address, &count, &hosts); n != 3 {
		t.Skip("only when another test starts it")
	}
	conns := make([]*net.TCPConn, count)
	var wait sync.WaitGroup
	turns := make(chan struct{}, 64)
	for i := range conns {
		turns <- struct{}{}
		wait.Go(func() {
			defer func() { <-turns }()
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%hosts))}}
			c, err := d.DialContext(t.Context(), "tcp", address)
			if err != nil {
				t.Error(err)
				return
			}
			conns[i] = c.(*net.TCPConn)
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			_ = stalls[i%len(stalls)].say(c) // it may be cut off by now
		})
	}
	wait.Wait()
	fmt.Println("stalled")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	for i, c := range conns {
		if c == nil {
			continue
		}
		if i/len(stalls)%2 == 0 { // RST instead of FIN
			_ = c.SetLinger(0)
		}
		_ = c.Close()
	}
	fmt.Println("gone")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // so that it is not the end of the process that closes them
}

// attackers is such a process.
type attackers struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Scanner
	cmd *exec.Cmd
}

func attack(t *testing.T, address string, count, hosts int) *attackers {
	t.Helper()
	a := &attackers{t: t, cmd: exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAttackers$", "-test.v")}
	a.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d", attackEnv, address, count, hosts))
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	a.out = bufio.NewScanner(out)
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a.wait("stalled")
	return a
}

func (a *attackers) wait(line string) {
	a.t.Helper()
	var said []string
	for a.out.Scan() {
		if a.out.Text() == line {
			return
		}
		said = append(said, a.out.Text())
	}
	a.t.Fatalf("attackers ended: %s", strings.Join(said, "\n"))
}

func (a *attackers) vanish() {
	a.t.Helper()
	if _, err := io.WriteString(a.in, "vanish\n"); err != nil {
		a.t.Fatal(err)
	}
	a.wait("gone")
}

func (a *attackers) end() {
	a.t.Helper()
	_ = a.in.Close()
	go func() { // it may be blocked in what it says
		for a.out.Scan() {
		}
	}()
	if err := a.cmd.Wait(); err != nil {
		a.t.Errorf("attackers: %v", err)
	}
}

// footprint is what a process holds.
type footprint struct{ goroutines, files, connections, rss, heap int }

func (f footprint) String() string {
	return fmt.Sprintf("%5d connections, %5d goroutines, %5d files, %4d MiB resident, %4d MiB in use", f.connections, f.goroutines, f.files, f.rss>>20, f.heap>>20)
}

func measure(t testing.TB, s *Server, tidy bool) footprint {
	t.Helper()
	if tidy {
		runtime.GC() // pools keep what they have for two
		debug.FreeOSMemory()
	}
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	if err != nil {
		t.Fatal(err)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return footprint{runtime.NumGoroutine(), len(files) - 1, connections(s), pages * os.Getpagesize(), int(m.HeapInuse)}
}

// patient is a client that is what clients should be, all the time: it reads and
// writes, and from time to time somebody like it connects.
type patient struct {
	t                   *testing.T
	requests, newcomers atomic.Int64
	refused             atomic.Int64
	slowest, slowestNew atomic.Int64 // ns
	stop                context.CancelFunc
	wait                sync.WaitGroup
}

func beGood(t *testing.T, address string) *patient {
	ctx, stop := context.WithCancel(t.Context())
	g := &patient{t: t, stop: stop}
	longest := func(v *atomic.Int64, since time.Time) {
		if d := int64(time.Since(since)); d > v.Load() {
			v.Store(d)
		}
	}
	p := dial(t, "tcp", address)
	p.enter("a", true)
	g.wait.Go(func() {
		defer func() { _ = p.Close() }()
		for i := uint64(1); ctx.Err() == nil; i++ {
			p.deadline(20 * time.Second)
			begin := time.Now()
			switch i % 4 {
			case 0:
				p.request(0, cmdRead, i, 0, 1<<20)
				p.getStructured(0, 1<<20).want(t, i, 0)
			case 1:
				p.request(0, cmdWrite, i, 1<<20, 64<<10, make([]byte, 64<<10))
				p.getStructured(0, 0).want(t, i, 0)
			default:
				p.request(0, cmdRead, i, 8192, 4096)
				p.getStructured(8192, 4096).want(t, i, 0)
			}
			longest(&g.slowest, begin)
			g.requests.Add(1)
			time.Sleep(time.Millisecond)
		}
	})
	g.wait.Go(func() {
		for ctx.Err() == nil {
			begin := time.Now()
			for connect(address) != nil {
				g.refused.Add(1)
				time.Sleep(5 * time.Millisecond)
				if ctx.Err() != nil {
					return
				}
			}
			longest(&g.slowestNew, begin)
			g.newcomers.Add(1)
			time.Sleep(20 * time.Millisecond)
		}
	})
	return g
}

// connect opens the export and reads a little.
func connect(address string) error {
	c, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write(enter(wire(uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(7), uint64(0), uint32(16)))); err != nil {
		return err
	}
	got := make([]byte, 18+(20+12)+(20+14)+20+16+16) // hello, export, block sizes, acknowledgement, reply
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(got[len(got)-32:]) != magicSimple {
		return errors.New("wrong reply")
	}
	return nil
}

func (g *patient) end() {
	g.t.Helper()
	g.stop()
	g.wait.Wait()
	g.t.Logf("served meanwhile: %d requests, the slowest %v; %d newcomers, the slowest %v, %d times turned away",
		g.requests.Load(), time.Duration(g.slowest.Load()).Round(time.Millisecond), g.newcomers.Load(), time.Duration(g.slowestNew.Load()).Round(time.Millisecond), g.refused.Load())
	if g.requests.Load() < 20 || g.newcomers.Load() < 5 || g.slowest.Load() > int64(15*time.Second) || g.slowestNew.Load() > int64(15*time.Second) {
		g.t.Error("the good client was not served")
	}
}

// inTime is eventually where much has to happen.
func inTime(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// A thousand clients stop at every moment at which one can. Some vanish, without
// a word or with FIN, the others stay until they are cut off. What they held is
// free again then, and others were served all the time.
//
// The suite makes do with fewer; `make flood` means it.
func TestThousandClientsThatStall(t *testing.T) {
	count := 96
	if n, err := strconv.Atoi(os.Getenv("TIDEMARK_TEST_CLIENTS")); err == nil {
		count = n
	}
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(false, false)
	d := newFileDisk(t, 32<<20)
	if _, err := d.WriteAt(pattern(32<<20, 1), 0); err != nil {
		t.Fatal(err)
	}
	server := func() *Server { // plain hides the file, so that replies take memory
		return &Server{Exports: static(t, Export{Name: "a", Disk: plain{d}}), TLS: with}
	}
	check := func(t *testing.T, before, after footprint) {
		t.Helper()
		// What is resident is the race detector's too, where that runs.
		if after.goroutines > before.goroutines+4 || after.files > before.files+2 || after.heap > before.heap+16<<20 {
			t.Error("not all came back")
		}
	}
	t.Run("and vanish", func(t *testing.T) { // as many as come, all of one client, and nobody is cut off
		s := server()
		s.MaxConnections, s.MaxPerClient = 2*count, 2*count
		address := startTCP(t, s)
		g := beGood(t, address)
		before := measure(t, s, true)
		t.Logf("before: %v", before)
		a := attack(t, address, count, 1)
		during := measure(t, s, false)
		t.Logf("during: %v", during)
		if during.connections < count {
			t.Errorf("only %d connections", during.connections)
		}
		if most := count*(600<<10) + DefaultMaxMemory; during.heap > most {
			t.Errorf("%d MiB are in use", during.heap>>20)
		}
		time.Sleep(time.Second)
		a.vanish()
		inTime(t, "they are gone", func() bool { return connections(s) <= 2 })
		a.end()
		g.end()
		inTime(t, "nobody is there", func() bool { return connections(s) == 0 })
		after := measure(t, s, true)
		t.Logf("after:  %v", after)
		check(t, before, after)
	})
	t.Run("and stay", func(t *testing.T) { // of 20 addresses, against the usual limits
		s := server()
		s.HandshakeTimeout, s.RequestTimeout, s.WriteTimeout = 2*time.Second, 2*time.Second, 2*time.Second
		address := startTCP(t, s)
		g := beGood(t, address)
		before := measure(t, s, true)
		t.Logf("before: %v", before)
		a := attack(t, address, count, 20)
		during := measure(t, s, false)
		t.Logf("during: %v", during)
		if during.connections > DefaultMaxConnections {
			t.Errorf("%d connections", during.connections)
		}
		inTime(t, "they are cut off", func() bool { return connections(s) <= 2 })
		g.end()
		inTime(t, "nobody is there", func() bool { return connections(s) == 0 })
		after := measure(t, s, true)
		t.Logf("after:  %v", after)
		check(t, before, after)
		a.vanish()
		a.end()
	})
}

// narrow is a disk that reads so many blocks at once, a millisecond each, in the
// order of asking.
func narrow(t testing.TB, width int) *hooked {
	turns := make(chan struct{}, width)
	d := &hooked{WritableDisk: newMemDisk(diskSize)}
	d.read = func(int64, int) error {
		turns <- struct{}{}
		time.Sleep(time.Millisecond)
		<-turns
		return nil
	}
	t.Cleanup(func() { d.read = nil })
	return d
}

// One client has 16 connections with 64 reads under way on each. Another, which
// reads one block at a time, still gets its own within a bounded time.
func TestFloodLeavesOthersTheirShare(t *testing.T) {
	for name, c := range map[string]struct {
		server *Server
		most   time.Duration // for nine of ten reads
	}{
		"memory":      {&Server{Exports: static(t, Export{Disk: newMemDisk(diskSize)})}, time.Second},
		"narrow disk": {&Server{Exports: static(t, Export{Disk: narrow(t, 4)}), MaxRequests: 32}, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			address := startTCP(t, c.server)
			victim := dialFrom(t, "127.0.0.1", address)
			victim.enter("", false)
			handle := uint64(0)
			times := func(n int) (p50, p90, p99 time.Duration) {
				list := make([]time.Duration, n)
				for i := range list {
					handle++
					begin := time.Now()
					victim.request(0, cmdRead, handle, 0, 4096)
					victim.getSimple(4096).want(t, handle, 0)
					list[i] = time.Since(begin)
				}
				slices.Sort(list)
				return list[n/2], list[n*9/10], list[n*99/100]
			}
			times(20)
			p50, p90, p99 := times(100)
			t.Logf("alone: median %v, 90 %% within %v, 99 %% within %v", p50, p90, p99)
			var read atomic.Int64
			var wait sync.WaitGroup
			for range 16 {
				flooder := dialFrom(t, "127.0.0.2", address)
				flooder.enter("", false)
				window := reads(64, 4096)
				wait.Go(func() {
					if _, err := flooder.Write(window); err != nil {
						return
					}
					for reply := make([]byte, 16+4096); ; read.Add(1) {
						if _, err := io.ReadFull(flooder, reply); err != nil {
							return
						}
						if _, err := flooder.Write(window[:requestLength]); err != nil {
							return
						}
					}
				})
				defer func() { _ = flooder.Close() }()
			}
			eventually(t, "the flood is there", func() bool { return read.Load() > 200 })
			begin, before := time.Now(), read.Load()
			p50, p90, p99 = times(100)
			t.Logf("beside %d reads/s: median %v, 90 %% within %v, 99 %% within %v",
				int(float64(read.Load()-before)/time.Since(begin).Seconds()), p50, p90, p99)
			if p90 > c.most {
				t.Errorf("90 %% within %v", p90)
			}
		})
	}
}
