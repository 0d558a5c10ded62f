package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// livePull is what a backup tool of somebody else does: it asks what is dirty and reads that.
const livePull = `import nbd, sys
uri, context, path = sys.argv[1:]
h = nbd.NBD()
h.add_meta_context(context)
h.connect_uri(uri)
assert h.can_meta_context(context), "no context " + context
size, at, total = h.get_size(), 0, 0
dirty = []
def status(name, offset, entries, err):
    global at
    if name != context: return
    for n, flags in zip(entries[::2], entries[1::2]):
        if flags & 1: dirty.append((offset, n))
        offset += n
    at = offset
while at < size:
    h.block_status(min(size - at, 16 << 20), at, status)
with open(path, "r+b") as out:
    for offset, n in dirty:
        total += n
        while n > 0:
            k = min(n, 1 << 20)
            out.seek(offset)
            out.write(h.pread(k, offset))
            offset, n = offset + k, n - k
h.shutdown()
print(total)
`

const liveSize = 48 << 20

// live is one device that is exported live, and the copy that is made of it.
type live struct {
	t                 *testing.T
	dev, copy, pins   string
	script, socketDir string
	n                 int
}

func newLive(t *testing.T) *live {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: not root")
	}
	for _, tool := range []string{"losetup", "fio", "nbdcopy", "qemu-img"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %v", err)
		}
	}
	dir := t.TempDir()
	if out, err := exec.Command("/usr/bin/python3", "-c", "import nbd; nbd.NBD()").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: no python3-libnbd: %v: %s", err, out)
	}
	l := &live{t: t, copy: filepath.Join(dir, "copy"), script: filepath.Join(dir, "pull.py"), socketDir: dir,
		pins: fmt.Sprintf("/sys/fs/bpf/tidemark-live-%d", os.Getpid())}
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(l.script, []byte(livePull), 0o600); err != nil {
		t.Fatal(err)
	}
	l.run("dd", "if=/dev/urandom", "of="+image, "bs=1M", "count="+strconv.Itoa(liveSize>>20), "status=none")
	l.dev = strings.TrimSpace(string(l.run("losetup", "--show", "-f", image)))
	t.Cleanup(func() {
		l.run(binary, "untrack", "--all", "--pin-dir", l.pins, "--state-dir", dir)
		l.run("losetup", "-d", l.dev)
		_ = os.RemoveAll(l.pins)
	})
	return l
}

func (l *live) run(name string, args ...string) []byte {
	l.t.Helper()
	c := exec.Command(name, args...)
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		l.t.Fatalf("%s %v: %v: %s", name, args, err, errs.Bytes())
	}
	return out
}

type liveBegin struct {
	URI      string   `json:"uri"`
	Context  string   `json:"context"`
	ChangeID string   `json:"change_id"`
	Changed  int64    `json:"changed_bytes"`
	Unknown  []string `json:"unknown"`
}

type liveEnd struct {
	Unread    int64 `json:"unread_bytes"`
	Meanwhile int64 `json:"written_meanwhile_bytes"`
	Instant   bool  `json:"instant"`
	Committed bool  `json:"committed"`
}

// exporter is a running export.
type exporter struct {
	liveBegin
	l     *live
	c     *exec.Cmd
	words *json.Decoder
	errs  *bytes.Buffer
}

func (l *live) export(since string, more ...string) *exporter {
	l.t.Helper()
	l.n++
	args := append([]string{"export", "--live", l.dev, "--socket", filepath.Join(l.socketDir, fmt.Sprintf("s%d", l.n)), "--json", "--pin-dir", l.pins}, more...)
	if since != "" {
		args = append(args, "--since", since)
	}
	e := &exporter{l: l, c: exec.Command(binary, args...), errs: &bytes.Buffer{}}
	e.c.Stderr = e.errs
	out, err := e.c.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := e.c.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = e.c.Process.Kill() })
	e.words = json.NewDecoder(bufio.NewReader(out))
	if err := e.words.Decode(&e.liveBegin); err != nil {
		_ = e.c.Wait()
		l.t.Fatalf("%v: %s", err, e.errs)
	}
	return e
}

// end waits for the report, after an interrupt if it needs one.
func (e *exporter) end(sig os.Signal) (r liveEnd) {
	e.l.t.Helper()
	if sig != nil {
		if err := e.c.Process.Signal(sig); err != nil {
			e.l.t.Fatal(err)
		}
	}
	if err := e.words.Decode(&r); err != nil && err != io.EOF {
		e.l.t.Fatal(err)
	}
	if err := e.c.Wait(); err != nil {
		e.l.t.Fatalf("%v: %s", err, e.errs)
	}
	return r
}

// pull brings the copy what is dirty.
func (l *live) pull(e *exporter) (total int64) {
	l.t.Helper()
	out := l.run("/usr/bin/python3", l.script, e.URI, e.Context, l.copy)
	total, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	if err != nil {
		l.t.Fatal(err)
	}
	if total != e.Changed {
		l.t.Errorf("the bitmap has %d bytes, %d were announced", total, e.Changed)
	}
	return total
}

// writeFor has fio write for a while.
func (l *live) write(ctx context.Context) (wait func()) {
	l.t.Helper()
	c := exec.CommandContext(ctx, "fio", "--name=w", "--filename="+l.dev, "--rw=randwrite", "--bsrange=512-32k", "--ioengine=libaio", "--direct=1",
		"--iodepth=4", "--rate_iops=400", "--time_based", "--runtime=600", "--size="+strconv.Itoa(liveSize), "--randrepeat=0", "--norandommap", "--random_distribution=zipf:1.1")
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGINT) }
	c.WaitDelay = 10 * time.Second
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		l.t.Fatal(err)
	}
	return func() { _ = c.Wait() }
}

func (l *live) equal() bool {
	l.t.Helper()
	l.run("blockdev", "--flushbufs", l.dev)
	return exec.Command("cmp", "-s", l.copy, l.dev).Run() == nil
}

// TestLiveExport has clients that others wrote make a copy of a device that is written to all the time: a whole one, and increments.
// Some pulls are in vain: the client gives up, the exporter is killed. When the writer has stopped, one more pull
// makes the copy equal to the device.
func TestLiveExport(t *testing.T) {
	l := newLive(t)
	ctx, stopWriter := context.WithCancel(t.Context())
	defer stopWriter()
	waitWriter := l.write(ctx)

	e := l.export("")
	if e.Context != "" || e.Changed != liveSize || e.Unknown != nil {
		t.Errorf("the first pull: %+v", e.liveBegin)
	}
	l.run("nbdcopy", e.URI, l.copy)
	since := e.ChangeID
	if r := e.end(os.Interrupt); r.Unread != 0 || r.Meanwhile == 0 || r.Instant || r.Committed {
		t.Errorf("%+v", r)
	}

	for round := range 6 {
		time.Sleep(300 * time.Millisecond)
		var more []string
		switch round {
		case 1: // the exporter is killed before anybody has read
			k := l.export(since)
			_ = k.c.Process.Kill()
			_ = k.c.Wait()
		case 2: // the client reads some, and goes; then the exporter is told to end
			k := l.export(since)
			l.run("/usr/bin/python3", "-c", "import nbd,sys; h=nbd.NBD(); h.connect_uri(sys.argv[1]); h.pread(4096,0)", k.URI)
			if r := k.end(os.Interrupt); r.Unread == 0 || r.Instant {
				t.Errorf("a client that left: %+v", r)
			}
		case 3:
			more = []string{"--commit-on-disconnect"}
		case 4: // it is killed in the middle of a read
			k := l.export(since)
			c := exec.Command("/usr/bin/python3", l.script, k.URI, k.Context, l.copy+".half")
			if err := exec.Command("truncate", "-s", strconv.Itoa(liveSize), l.copy+".half").Run(); err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(30 * time.Millisecond)
			_ = k.c.Process.Kill()
			_ = k.c.Wait()
			_ = c.Wait()
		}
		e := l.export(since, more...)
		if e.Unknown != nil || e.Changed == 0 || e.Changed == liveSize {
			t.Errorf("round %d: %+v", round, e.liveBegin)
		}
		if round == 0 {
			l.qemuAgrees(e)
		}
		total := l.pull(e)
		var sig = os.Interrupt
		if more != nil {
			sig = nil // it ends by itself
		}
		r := e.end(sig)
		if r.Unread != 0 || r.Instant != (r.Meanwhile == 0) || r.Committed != (more != nil) {
			t.Errorf("round %d: %+v", round, r)
		}
		t.Logf("round %d: %d KiB pulled, %d KiB written meanwhile", round, total>>10, r.Meanwhile>>10)
		since = e.ChangeID
	}
	for try := 0; l.equal(); try++ { // its writer rests at times
		if try == 100 {
			t.Fatal("the copy equals a device that is being written to: nothing can be seen here")
		}
		time.Sleep(50 * time.Millisecond)
	}

	stopWriter()
	waitWriter()
	e = l.export(since)
	l.pull(e)
	if r := e.end(os.Interrupt); !r.Instant || r.Meanwhile != 0 || r.Unread != 0 {
		t.Errorf("after the writer: %+v", r)
	}
	if !l.equal() {
		t.Fatal("the copy differs from the device")
	}

	// What is not known is all dirty, and is told.
	other := "0123456789abcdef0123456789abcdef.1"
	e = l.export(other)
	if len(e.Unknown) == 0 || e.Changed != liveSize {
		t.Errorf("since another tracking: %+v", e.liveBegin)
	}
	if err := os.Truncate(l.copy, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(l.copy, liveSize); err != nil {
		t.Fatal(err)
	}
	l.pull(e)
	e.end(os.Interrupt)
	if !l.equal() {
		t.Error("the copy of all that is unknown differs")
	}
	// What was committed can't be asked for again.
	id := e.ChangeID
	time.Sleep(10 * time.Millisecond)
	e = l.export(id)
	next := e.ChangeID
	e.end(os.Interrupt)
	l.run(binary, "export", "--live", l.dev, "--commit", next, "--pin-dir", l.pins)
	e = l.export(id)
	if len(e.Unknown) == 0 || e.Changed != liveSize {
		t.Errorf("since what was given up: %+v", e.liveBegin)
	}
	e.end(os.Interrupt)
}

// qemuAgrees asks QEMU what is dirty.
func (l *live) qemuAgrees(e *exporter) {
	l.t.Helper()
	socket := e.URI[strings.Index(e.URI, "socket=")+len("socket="):]
	out := l.run("qemu-img", "map", "--output=json", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+socket+",x-dirty-bitmap="+e.Context)
	var list []struct {
		Start, Length int64
		Data          bool
	}
	if err := json.Unmarshal(out, &list); err != nil {
		l.t.Fatal(err)
	}
	var dirty int64
	for _, x := range list {
		if !x.Data { // docs/interop/nbd.rst: x-dirty-bitmap shows what is dirty as no data
			dirty += x.Length
		}
	}
	if dirty != e.Changed {
		l.t.Errorf("QEMU finds %d bytes dirty, %d were announced", dirty, e.Changed)
	}
}
