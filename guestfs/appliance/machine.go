package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/internal/tail"
	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
)

// ErrNoQEMU is wrapped when QEMU is not installed.
var ErrNoQEMU = errors.New("qemu-system-x86_64 is not installed (Debian: qemu-system-x86)")

const (
	// overlayLimit is how much a replay may write. XFS' largest log is 2 GiB.
	overlayLimit = 4 << 30
	kvmBootTime  = 20 * time.Second
	tcgBootTime  = 3 * time.Minute
	consoleKept  = 16 << 10
)

// machine is one appliance that runs.
type machine struct {
	client *client
	qemu   *exec.Cmd

	console console
	exited  chan struct{} // closed when QEMU is gone
	served  chan struct{} // closed when nothing reads the disk any more
	stop    context.CancelFunc
	overlay *restore.Overlay
	closer  io.Closer // of the disk below; set when it is taken from its Disk
	closing sync.Once
}

// console keeps the end of what the machine prints.
type console struct{ tail.Buffer }

// reason is what the console says about the end.
func (c *console) reason() string {
	last := ""
	for line := range strings.Lines(c.String()) {
		line = strings.TrimSpace(strings.ToValidUTF8(line, "?"))
		if _, panicked, ok := strings.Cut(line, "Kernel panic - "); ok {
			return "kernel panic: " + panicked
		}
		if line != "" {
			last = line
		}
	}
	return last
}

// unsynced is a throw-away disk: nobody needs it after a power cut.
type unsynced struct{ *restore.Overlay }

func (unsynced) Sync() error { return nil }

// oneConn is a listener of a single connection.
type oneConn struct {
	net.Conn
	once sync.Once
	done chan struct{}
}

func (l *oneConn) Accept() (c net.Conn, err error) {
	l.once.Do(func() { c = l.Conn })
	if c != nil {
		return c, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error   { close(l.done); return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{Net: "unix"} }

// socketPair is a connection, and its other end to be inherited.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours := os.NewFile(uintptr(fds[0]), "appliance")
	theirs := os.NewFile(uintptr(fds[1]), "appliance")
	conn, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}

// start boots an appliance over the disk and waits until it answers. The disk must
// outlive the machine.
func (c *Config) start(ctx context.Context, disk restore.Disk, image, initrd *os.File, accel string) (_ *machine, err error) {
	program, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return nil, ErrNoQEMU
	}
	overlay, err := throwAwayOverlay(disk)
	if err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	m := &machine{console: console{tail.Buffer{Max: consoleKept}}, overlay: overlay, exited: make(chan struct{}), served: make(chan struct{})}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	m.stop = stop
	blocks, theirBlocks, err := socketPair()
	if err != nil {
		stop()
		return nil, errors.Join(err, overlay.Close())
	}
	defer func() { _ = theirBlocks.Close() }()
	exports, err := nbd.NewStatic(nbd.Export{Name: "disk", Disk: unsynced{overlay}})
	if err != nil {
		stop()
		return nil, errors.Join(err, overlay.Close(), blocks.Close())
	}
	go func() {
		defer close(m.served)
		srv := &nbd.Server{Exports: exports, DrainTimeout: time.Second, Log: c.Log}
		_ = srv.Serve(serving, &oneConn{Conn: blocks, done: make(chan struct{})})
	}()
	exited := false
	defer func() {
		if err != nil {
			if !exited {
				close(m.exited)
			}
			m.close()
		}
	}()
	talk, theirTalk, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer func() { _ = theirTalk.Close() }()
	m.client = newClient(talk)
	m.qemu = exec.Command(program, c.qemuArgs(accel)...)                  //nolint:noctx // close ends it, with its parent at the latest
	m.qemu.ExtraFiles = []*os.File{image, initrd, theirTalk, theirBlocks} // 3, 4, 5, 6
	m.qemu.Stdout = &m.console
	m.qemu.Stderr = &m.console
	m.qemu.Env = []string{"PATH=/usr/bin:/bin"}
	m.qemu.Dir = "/"
	m.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true, Credential: unprivileged()}
	began := make(chan error)
	go func() {
		// The signal of the parent's death comes when the thread that forked ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := m.qemu.Start()
		began <- err
		if err != nil {
			return
		}
		c.limit(m.qemu.Process.Pid)
		_ = m.qemu.Wait() // the console says why
		close(m.exited)
		m.client.fail(errors.New("it has ended"))
	}()
	if err := <-began; err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	exited = true // whoever waits closes it
	limit := tcgBootTime
	if accel == "kvm" {
		limit = kvmBootTime
	}
	stopHello := context.AfterFunc(ctx, func() { _ = talk.SetDeadline(time.Unix(1, 0)) })
	defer stopHello()
	_ = talk.SetReadDeadline(time.Now().Add(limit))
	if err := m.client.hello(); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		select {
		case <-m.exited:
		case <-time.After(100 * time.Millisecond):
		}
		return nil, fmt.Errorf("appliance did not start: %w: %s", err, m.console.reason())
	}
	_ = talk.SetReadDeadline(time.Time{})
	go m.client.receive()
	return m, nil
}

// throwAwayOverlay has no name: it is gone with the process, whatever ends it.
func throwAwayOverlay(disk restore.Disk) (*restore.Overlay, error) {
	dir, err := os.MkdirTemp("", "tidemark-files-")
	if err != nil {
		return nil, err
	}
	ov, err := restore.CreateOverlay(filepath.Join(dir, "overlay"), disk, "throw-away")
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		return nil, err
	}
	if err := ov.Limit(overlayLimit); err != nil {
		return nil, errors.Join(err, ov.Close())
	}
	return ov, nil
}

// unprivileged is who QEMU runs as, if we are root: nobody, with the group that may use KVM.
func unprivileged() *syscall.Credential {
	if os.Getuid() != 0 {
		return nil
	}
	const nobody = 65534
	c := &syscall.Credential{Uid: nobody, Gid: nobody}
	var st unix.Stat_t
	if unix.Stat("/dev/kvm", &st) == nil && st.Gid != 0 {
		c.Groups = []uint32{st.Gid}
	}
	return c
}

// limit bounds what QEMU may take of the host.
func (c *Config) limit(pid int) {
	memory := uint64(c.memory())<<20 + 2<<30 // its own, and translated code
	for resource, value := range map[int]uint64{
		unix.RLIMIT_AS: memory, unix.RLIMIT_CORE: 0, unix.RLIMIT_FSIZE: 0, unix.RLIMIT_NOFILE: 128,
	} {
		_ = unix.Prlimit(pid, resource, &unix.Rlimit{Cur: value, Max: value}, nil) // it may have ended
	}
}

func (c *Config) memory() int {
	if c.MemoryMiB > 0 {
		return c.MemoryMiB
	}
	return 512
}

func (c *Config) qemuArgs(accel string) []string {
	cpu := "max"
	if accel == "kvm" {
		cpu = "host"
	}
	return []string{
		"-name", "tidemark-files",
		"-accel", accel, "-cpu", cpu, "-smp", "1", "-m", fmt.Sprintf("%dM", c.memory()),
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-nic", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", "/proc/self/fd/3", "-initrd", "/proc/self/fd/4",
		// What is wrong must end it: half a kernel would answer with half a tree.
		"-append", "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 mitigations=off random.trust_cpu=on gpt TIDEMARK_APPLIANCE=1",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=talk,fd=5", "-device", "virtserialport,chardev=talk,name=" + portName,
		"-blockdev", "driver=nbd,node-name=disk,server.type=fd,server.str=6,export=disk",
		"-device", "virtio-blk-pci,drive=disk",
	}
}

// close ends the machine and waits until all of it is gone.
func (m *machine) close() {
	m.closing.Do(func() {
		if m.client != nil {
			m.client.fail(errors.New("it was stopped"))
		}
		if m.qemu != nil && m.qemu.Process != nil {
			_ = m.qemu.Process.Kill()
		}
		<-m.exited
		m.stop()
		<-m.served
		_ = m.overlay.Close() // nobody will read it
	})
}
