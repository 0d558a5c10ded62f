package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// killServer names the folder in which this process shall serve an overlay, if it is the
// child of the test below.
const killServer = "TIDEMARK_TEST_NBD_KILL"

const (
	killSize     = 6<<20 + 512
	killIdentity = "base"
)

func killBase() disktest.Bytes { return disktest.Bytes(disktest.Content(killSize, 31)) }

// TestServerToBeKilled is that child.
func TestServerToBeKilled(t *testing.T) {
	dir := os.Getenv(killServer)
	if dir == "" {
		t.Skip("only the child of TestFlushedDataOutlivesTheServer runs it")
	}
	o, err := restore.OpenOrCreateOverlay(filepath.Join(dir, "overlay"), killBase(), killIdentity)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(context.Background(), "unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("listening")
	t.Fatal((&Server{Exports: static(t, Export{Disk: restore.NewHydratable(o)})}).Serve(context.Background(), l))
}

// change is a write, or zeroes where data is nil.
type change struct {
	off, n int
	data   []byte
}

func (c change) apply(to []byte) {
	if c.data == nil {
		clear(to[c.off : c.off+c.n])
		return
	}
	copy(to[c.off:], c.data)
}

// TestFlushedDataOutlivesTheServer writes to an overlay through the protocol on one connection, flushes by
// FUA or on another connection, and kills the server at random moments. All that was answered
// before an answered flush was sent must be there.
func TestFlushedDataOutlivesTheServer(t *testing.T) {
	dir, err := os.MkdirTemp("", "nbdkill") // short, for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	model := bytes.Clone(killBase())
	flushes := 0
	for round := range 6 {
		written, durable := writeUntilServerDies(t, dir, uint64(round))
		flushes += durable.count
		for _, c := range written[:durable.upTo] {
			c.apply(model)
		}
		maybe := make([]bool, killSize)
		for _, c := range written[durable.upTo:] {
			for i := c.off; i < c.off+c.n; i++ {
				maybe[i] = true
			}
		}
		o, err := restore.OpenOverlay(filepath.Join(dir, "overlay"), killBase(), killIdentity)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		got := make([]byte, killSize)
		if _, err := o.ReadAt(got, 0); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		for i := range got {
			if got[i] != model[i] && !maybe[i] {
				t.Fatalf("round %d: after %d changes, of which %d were flushed, byte %d is %#x, want %#x", round, len(written), durable.upTo, i, got[i], model[i])
			}
		}
		model = got // from here on what is there counts
	}
	if flushes < 6 {
		t.Errorf("only %d flushes were answered: this proves nothing", flushes)
	}
}

// flushed says how many changes are known to be durable, by how many answers.
type flushed struct{ upTo, count int }

func writeUntilServerDies(t *testing.T, dir string, seed uint64) (written []change, durable flushed) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestServerToBeKilled$")
	cmd.Env = append(os.Environ(), killServer+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	line := make([]byte, len("listening"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "listening" {
		t.Fatalf("child says %q, %v", line, err)
	}
	a, b := dial(t, "unix", filepath.Join(dir, "s")), dial(t, "unix", filepath.Join(dir, "s"))
	a.enter("", false)
	b.enter("", false)
	rnd := rand.New(rand.NewPCG(seed, 17))
	killed := time.AfterFunc(time.Duration(50+rnd.IntN(400))*time.Millisecond, func() { _ = cmd.Process.Kill() })
	defer killed.Stop()
	defer func() { _ = cmd.Process.Kill() }()
	// ask sends one request and tells whether it was answered, with success.
	ask := func(p *peer, flags, cmd uint16, c change) bool {
		msg := wire(uint32(magicRequest), flags, cmd, uint64(len(written)), uint64(c.off), uint32(c.n), c.data)
		if _, err := p.Write(msg); err != nil {
			return false
		}
		reply := make([]byte, 16)
		if _, err := io.ReadFull(p, reply); err != nil {
			return false
		}
		if e := binary.BigEndian.Uint32(reply[4:]); e != 0 {
			t.Fatalf("command %d: error %d", cmd, e)
		}
		return true
	}
	for {
		c := change{off: rnd.IntN(killSize)}
		c.n = min(1+rnd.IntN(1<<rnd.IntN(18)), killSize-c.off)
		cmd, flags := uint16(cmdWrite), uint16(0)
		switch rnd.IntN(8) {
		case 0:
			cmd = cmdTrim
		case 1:
			cmd = cmdWriteZeroes
		default:
			c.data = disktest.Noise(c.n, rnd.Uint64())
		}
		if rnd.IntN(6) == 0 {
			flags = cmdFlagFUA
		}
		written = append(written, c)
		if !ask(a, flags, cmd, c) {
			return written, durable
		}
		if flags == 0 && rnd.IntN(5) == 0 {
			if !ask(b, 0, cmdFlush, change{}) {
				return written, durable
			}
			flags = cmdFlagFUA
		}
		if flags != 0 {
			durable = flushed{len(written), durable.count + 1}
		}
	}
}
