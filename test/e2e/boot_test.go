package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// text is what a process printed so far.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (x *text) Write(p []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.b.Write(p)
}

func (x *text) String() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.b.String()
}

// bootRig is a repository with one point of a source VM's disk that was not yet written to.
type bootRig struct {
	t           *testing.T
	dir, kernel string
}

func newBootRig(t *testing.T) *bootRig {
	t.Helper()
	testvm.RequireVM(t)
	if os.Geteuid() != 0 {
		t.Skip("SKIP: needs root: it makes a backup")
	}
	k, err := testvm.FetchKernel(t.Context(), testvm.KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "boot") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	r := &bootRig{t: t, dir: dir, kernel: k.Image}
	t.Cleanup(func() {
		r.endAll()
		_ = os.RemoveAll(dir)
	})
	// Something that takes time to copy.
	bulk := make([]byte, 24<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(bulk)
	if err := testvm.BuildImage(t.Context(), r.path("source.raw"), 96<<20, testvm.ImageOptions{Files: map[string]string{"bulk": string(bulk)}}); err != nil {
		t.Fatal(err)
	}
	r.tidemark("init")
	pins := fmt.Sprintf("/sys/fs/bpf/tidemark-boot-%d", os.Getpid())
	t.Cleanup(func() {
		_ = exec.Command(binary, "untrack", "--all", "--pin-dir", pins).Run()
		_ = os.RemoveAll(pins)
	})
	r.tidemark("backup", "vm", "--disk", r.path("source.raw"), "--pin-dir", pins)
	return r
}

func (r *bootRig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *bootRig) command(args ...string) *exec.Cmd {
	c := exec.Command(binary, args...)
	c.Env = append(os.Environ(), "TIDEMARK_REPO="+r.path("repo"), "TMPDIR="+r.dir)
	return c
}

func (r *bootRig) tidemark(args ...string) string {
	r.t.Helper()
	out, err := r.command(args...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("tidemark %v: %v: %s", args, err, out)
	}
	return string(out)
}

// guest is a boot of the point whose console is watched.
type guest struct {
	r            *bootRig
	cmd          *exec.Cmd
	console, log text
	done         chan struct{}
}

// kernelArgs boot the guest of test/vm from its disk.
func (r *bootRig) kernelArgs(mode string) []string {
	return []string{
		"--accel", "tcg", "--bus", "nvme", "--memory", "256MiB", "--kernel", r.kernel, "--append",
		"console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on root=/dev/nvme0n1 rootfstype=ext4 ro init=/init tidemark.pause=20 tidemark.mode=" + mode,
	}
}

func (r *bootRig) boot(ref, mode string, args ...string) *guest {
	r.t.Helper()
	g := &guest{r: r, done: make(chan struct{})}
	g.cmd = r.command(append(append([]string{"boot", ref}, r.kernelArgs(mode)...), args...)...)
	g.cmd.Stdout, g.cmd.Stderr = &g.console, &g.log
	g.cmd.WaitDelay = time.Second // a VM that goes on has the pipe
	if err := g.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	go func() {
		_ = g.cmd.Wait()
		close(g.done)
	}()
	r.t.Cleanup(func() {
		_ = g.cmd.Process.Kill()
		<-g.done
	})
	return g
}

// wait waits for a text on the console or in the messages.
func (g *guest) wait(what string, in *text) {
	g.r.t.Helper()
	re := regexp.MustCompile(what)
	for end := time.Now().Add(90 * time.Second); !re.MatchString(in.String()); time.Sleep(20 * time.Millisecond) {
		select {
		case <-g.done:
			if re.MatchString(in.String()) {
				return
			}
			g.r.t.Fatalf("it ended before %q:\n%s\n%s", what, g.console.String(), g.log.String())
		default:
		}
		if time.Now().After(end) {
			g.r.t.Fatalf("waited in vain for %q:\n%s\n%s", what, g.console.String(), g.log.String())
		}
	}
}

// number is the last one that the guest told of.
func number(console, what string) int {
	all := regexp.MustCompile(`TIDEMARK-GUEST `+what+` (\d+)\r?\n`).FindAllStringSubmatch(console, -1)
	if len(all) == 0 {
		return -1
	}
	n, _ := strconv.Atoi(all[len(all)-1][1])
	return n
}

// runs tells whether a process has the text in its arguments.
func (r *bootRig) runs(text string) bool {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(text)) {
			return true
		}
	}
	return false
}

// gone waits until nothing is left of a boot that was killed.
func (r *bootRig) gone() {
	r.t.Helper()
	var left []string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		left, _ = filepath.Glob(r.path("tidemark-*"))
		if !r.runs(r.path("tidemark-boot-")) && len(left) == 0 {
			return
		}
	}
	all, _ := exec.Command("ps", "-eo", "pid,ppid,stat,wchan:20,args").Output()
	for line := range strings.Lines(string(all)) {
		if strings.Contains(line, r.dir) {
			r.t.Log(line[:min(len(line), 200)])
		}
	}
	r.t.Fatalf("a killed boot left %v, or its QEMU", left)
}

// TestBootIsTransactional boots a VM that writes for ever; kills the server of its disk in mid-boot, and in
// mid-hydration; moves it to a disk of its own and kills the server once more. At every step all
// that the guest had reported durable must be there.
func TestBootIsTransactional(t *testing.T) {
	r := newBootRig(t)
	overlay, native := r.path("vm.overlay"), r.path("native.raw")

	first := r.boot("vm", "writer", "--overlay", overlay)
	first.wait("TIDEMARK-GUEST wrote 6\r?\n", &first.console)
	_ = first.cmd.Process.Kill()
	<-first.done
	r.gone()
	wrote := number(first.console.String(), "wrote")
	t.Logf("killed after file %d", wrote)

	// What it wrote is a point, and the point is base and overlay.
	out := r.tidemark("commit", overlay, "--json")
	var made struct {
		Point struct {
			ID, Parent, Consistency string
			Disks                   []struct{ Stats struct{ Read, Stored int64 } }
		}
	}
	if err := json.Unmarshal([]byte(out), &made); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if s := made.Point.Disks[0].Stats; made.Point.Consistency != "crash" || s.Read == 0 || s.Read > 32<<20 {
		t.Errorf("commit: %s", out)
	}
	r.tidemark("restore", "vm@"+made.Point.ID, "-o", r.path("committed.raw"))
	r.sameAsExport("vm@"+made.Point.Parent, overlay, r.path("committed.raw"))

	// The same overlay over the same point: by its ID, as latest is the committed one now.
	second := r.boot("vm@"+made.Point.Parent, "writer", "--overlay", overlay, "--hydrate", native, "--hydrate-limit", "1MiB")
	second.wait("TIDEMARK-GUEST wrote \\d+\r?\n", &second.console)
	if last := number(second.console.String(), "last"); last < wrote || !strings.Contains(second.console.String(), fmt.Sprintf("TIDEMARK-GUEST complete %d\r\n", last)) {
		t.Fatalf("the guest had reported file %d; after the kill it finds\n%s", wrote, second.console.String())
	}
	second.wait(`hydrating disk0: [1-9][0-9] %`, &second.log)
	_ = second.cmd.Process.Kill()
	<-second.done
	r.gone()
	wrote = number(second.console.String(), "wrote")
	if _, err := os.Stat(native); err == nil {
		t.Fatal("a disk that is not whole has its name")
	}

	third := r.boot("vm@"+made.Point.Parent, "writer", "--overlay", overlay, "--hydrate", native)
	third.wait("needs neither the repository nor this process", &third.log)
	third.wait("TIDEMARK-GUEST wrote \\d+\r?\n", &third.console)
	if last := number(third.console.String(), "last"); last < wrote {
		t.Fatalf("the guest had reported file %d; after the second kill it finds\n%s", wrote, third.console.String())
	}
	t.Log(third.log.String())
	before := number(third.console.String(), "wrote")
	third.wait(fmt.Sprintf("TIDEMARK-GUEST wrote %d\r?\n", before+2), &third.console)
	_ = third.cmd.Process.Signal(syscall.SIGKILL)
	<-third.done
	wrote = number(third.console.String(), "wrote")
	if !r.runs(r.path("tidemark-boot-")) {
		t.Fatalf("the VM ended with its former server:\n%s", third.log.String())
	}
	// It goes on, and its disk grows. Then its power is cut.
	mod := func() time.Time {
		st, err := os.Stat(native)
		if err != nil {
			t.Fatal(err)
		}
		return st.ModTime()
	}
	at := mod()
	for end := time.Now().Add(20 * time.Second); !mod().After(at.Add(time.Second)); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the VM writes no more")
		}
	}
	r.endAll()
	r.gone()

	// The overlay is stale: nothing may start from it.
	if out, err := r.command(append([]string{"boot", "vm@" + made.Point.Parent, "--overlay", overlay}, r.kernelArgs("show")...)...).CombinedOutput(); err == nil || !strings.Contains(string(out), native) {
		t.Errorf("a stale overlay was used: %v: %s", err, out)
	}
	show, err := testvm.Start(t.Context(), testvm.Config{Kernel: mustKernel(t), Accel: testvm.TCG, Disk: testvm.Drive{File: native}, Mode: testvm.Show})
	if err != nil {
		t.Fatal(err)
	}
	defer show.Kill()
	if err := show.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rep := show.Report(); !rep.Complete || len(rep.Bad) > 0 || rep.Last <= wrote {
		t.Fatalf("the guest had written %d and went on without a server; its own disk has %+v", wrote, rep)
	} else {
		t.Logf("its own disk has files to %d, the console was cut at %d", rep.Last, wrote)
	}
}

func mustKernel(t *testing.T) *testvm.Kernel {
	t.Helper()
	k, err := testvm.FetchKernel(t.Context(), testvm.KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// endAll cuts the power of VMs whose guards are left.
func (r *bootRig) endAll() {
	r.t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(b, []byte("qemu-system")) || !bytes.Contains(b, []byte(r.path("tidemark-boot-"))) || bytes.Contains(b, []byte("__guard")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			r.t.Fatal(err)
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// sameAsExport compares a file with what an export of a point with an overlay shows.
func (r *bootRig) sameAsExport(ref, overlay, file string) {
	r.t.Helper()
	testvm.Require(r.t, "qemu-img")
	// A copy: an overlay has one user.
	if out, err := exec.Command("cp", "--sparse=always", overlay, overlay+".copy").CombinedOutput(); err != nil {
		r.t.Fatalf("cp: %v: %s", err, out)
	}
	sock := r.path("export.sock")
	c := r.command("export", ref, "--socket", sock, "--writable", "--overlay", overlay+".copy", "--quiet")
	if err := c.Start(); err != nil {
		r.t.Fatal(err)
	}
	defer func() {
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait()
	}()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		if time.Now().After(end) {
			r.t.Fatal("no export")
		}
	}
	if out, err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", "raw", "nbd+unix:///?socket="+sock, file).CombinedOutput(); err != nil {
		r.t.Errorf("the committed point is not base and overlay: %v: %s", err, out)
	}
}
