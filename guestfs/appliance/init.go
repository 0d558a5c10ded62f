package appliance

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/guestfs"
)

// IsInit tells whether this process is the first one of an appliance.
func IsInit() bool { return os.Getpid() == 1 && os.Getenv("TIDEMARK_APPLIANCE") == "1" }

// Names in the initramfs.
const (
	modulesList = "/modules.list" // paths of modules, in the order of loading
	diskName    = "vda"
	portName    = "tidemark"
)

// Init is the life of the appliance's first process. It never returns: the machine is powered off.
func Init() {
	err := initialize()
	fmt.Println("appliance:", err)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func initialize() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/mnt"}} {
		_ = os.MkdirAll(m[1], 0o755)
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := await("/sys/class/block/" + diskName); err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	k := &kernelLog{}
	if k.fd, err = unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("kernel log: %w", err)
	}
	volumes, err := findVolumes()
	if err != nil {
		return err
	}
	return newServer(volumes, k.mount).serve(port, port)
}

// await waits for a file that a driver makes.
func await(path string) error {
	for range 1000 {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("%s does not appear", path)
}

func loadModules() error {
	list, err := os.ReadFile(modulesList)
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(list)) {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("module %s: %w", path, err)
		}
		err = unix.FinitModule(fd, "", 0)
		_ = unix.Close(fd)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			// Accelerated ciphers refuse processors that lack what they need.
			fmt.Println("appliance: module", path, err)
		}
	}
	return nil
}

// port is the virtio-serial port, with plain blocking calls.
type port int

func (p port) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(p), b)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (p port) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Write(int(p), b[done:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func openPort() (port, error) {
	for range 1000 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if b, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(b)) == portName {
				fd, err := unix.Open("/dev/"+filepath.Base(filepath.Dir(n)), unix.O_RDWR|unix.O_CLOEXEC, 0)
				return port(fd), err
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return -1, errors.New("no virtio-serial port")
}

// findVolumes looks at the disk, or at its partitions as the kernel sees them.
func findVolumes() ([]guestfs.Volume, error) {
	parts, err := filepath.Glob("/sys/class/block/" + diskName + "[0-9]*")
	if err != nil {
		return nil, err
	}
	slices.SortFunc(parts, func(a, b string) int { return partNumber(a) - partNumber(b) })
	var volumes []guestfs.Volume
	devices.Lock()
	devices.of = map[string]string{}
	devices.Unlock()
	add := func(name, device string) error {
		v, err := probeDevice("/dev/" + device)
		if err != nil {
			return err
		}
		v.Name = name
		devices.Lock()
		devices.of[name] = "/dev/" + device
		devices.Unlock()
		volumes = append(volumes, v)
		return nil
	}
	for _, p := range parts {
		// An extended partition holds others; Linux shows 2 sectors of it.
		if b, err := os.ReadFile(filepath.Join(p, "size")); err == nil && strings.TrimSpace(string(b)) == "2" {
			continue
		}
		if err := add(fmt.Sprintf("p%d", partNumber(p)), filepath.Base(p)); err != nil {
			return nil, err
		}
	}
	if len(parts) == 0 {
		if err := add("whole", diskName); err != nil {
			return nil, err
		}
	}
	return volumes, nil
}

// devices are the nodes of the volumes, by name.
var devices struct {
	sync.Mutex
	of map[string]string
}

func partNumber(path string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(filepath.Base(path), diskName))
	return n
}

func probeDevice(path string) (guestfs.Volume, error) {
	f, err := os.Open(path)
	if err != nil {
		return guestfs.Volume{}, err
	}
	defer func() { _ = f.Close() }()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return guestfs.Volume{}, err
	}
	v, err := guestfs.Probe(f, size)
	if err != nil {
		return guestfs.Volume{Kind: "unknown", State: guestfs.NotFiles, Size: size, Why: "cannot be read: " + err.Error()}, nil
	}
	return v, nil
}

// fileSystem is how to mount a kind.
type fileSystem struct {
	kernel  string // its name there
	options string
	// writableFirst are those that replay nothing when they are mounted read-only.
	writableFirst bool
}

var fileSystems = map[string]fileSystem{
	"ext2": {kernel: "ext4"},
	"ext3": {kernel: "ext4"},
	"ext4": {kernel: "ext4"},
	// Two partitions may be copies of each other.
	"xfs": {kernel: "xfs", options: "nouuid"},
	// The default subvolume may leave out others.
	"btrfs": {kernel: "btrfs", options: "subvolid=5"},
	// "force": a dirty volume; what its log could not repair is refused all the same (fs/ntfs3/super.c).
	"ntfs":    {kernel: "ntfs3", options: "force", writableFirst: true},
	"vfat":    {kernel: "vfat", options: "utf8=1,shortname=mixed,tz=UTC"},
	"exfat":   {kernel: "exfat", options: "iocharset=utf8"},
	"iso9660": {kernel: "iso9660"},
}

// kernelLog mounts, and reads why that failed. Mounts take turns, so that reasons are not mixed up.
type kernelLog struct {
	mu sync.Mutex
	fd int
}

// lines are the messages since the last call.
func (k *kernelLog) lines() []string {
	var lines []string
	b := make([]byte, 8192)
	for {
		n, err := unix.Read(k.fd, b)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR) { // some were overwritten
			continue
		}
		if err != nil || n <= 0 {
			return lines
		}
		// "priority,sequence,time,flags;message\n"
		_, text, _ := strings.Cut(string(b[:n]), ";")
		text, _, _ = strings.Cut(text, "\n")
		lines = append(lines, text)
	}
}

func (k *kernelLog) mount(v guestfs.Volume) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	devices.Lock()
	device := devices.of[v.Name]
	devices.Unlock()
	fs, ok := fileSystems[v.Kind]
	if !ok {
		return -1, &guestfs.VolumeError{Volume: v.Name, Err: guestfs.ErrNoFiles, Reason: v.Kind}
	}
	dir := filepath.Join("/mnt", v.Name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return -1, err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME
	_ = k.lines()
	err := func() error {
		if !fs.writableFirst {
			return unix.Mount(device, dir, fs.kernel, flags|unix.MS_RDONLY, fs.options)
		}
		if err := unix.Mount(device, dir, fs.kernel, flags, fs.options); err != nil {
			return err
		}
		return unix.Mount("", dir, "", flags|unix.MS_RDONLY|unix.MS_REMOUNT, fs.options)
	}()
	if err != nil {
		reason := err.Error()
		if errors.Is(err, unix.ENODEV) {
			reason = fmt.Sprintf("the appliance's kernel has no %s", fs.kernel)
		}
		lines := k.lines()
		if len(lines) > 3 {
			lines = lines[len(lines)-3:]
		}
		if len(lines) > 0 {
			reason += ": " + strings.Join(lines, "; ")
		}
		return -1, &guestfs.VolumeError{Volume: v.Name, Err: guestfs.ErrMount, Reason: reason}
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &guestfs.VolumeError{Volume: v.Name, Err: guestfs.ErrMount, Reason: err.Error()}
	}
	return fd, nil
}
