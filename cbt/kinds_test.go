package cbt_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
)

// target is a device and how it is written to.
type target struct {
	dev    string    // what is tracked: the disk, or a partition of it
	disk   string    // what is written to
	parts  [2]string // partitions of the disk, or the disk itself
	sector string    // the smallest write
}

func whole(dev, sector string) target {
	return target{dev: dev, disk: dev, parts: [2]string{dev, dev}, sector: sector}
}

// loopDisk is a loop device with partitions.
func loopDisk(t *testing.T) target {
	t.Helper()
	dev := loopDevice(t, truthSize, truthTable())
	return target{dev: dev, disk: dev, parts: [2]string{dev + "p1", dev + "p2"}, sector: "512"}
}

// onlyPart has the second partition tracked, while all of the disk is written to.
func onlyPart(d target) target {
	d.dev = d.parts[1]
	return d
}

// kind is a kind of block device.
type kind struct {
	name string
	// open makes a device of the kind that ends with the test, or skips where there
	// can be none.
	open func(t *testing.T) target
	// refused is part of the reason why it is not tracked; nil or "" where it is.
	refused func() string
}

// rwPage is why drivers with an rw_page operation are refused on old kernels.
func rwPage() string {
	if kernelBefore(6, 4) {
		return "rw_page"
	}
	return ""
}

func always(why string) func() string { return func() string { return why } }

// kinds are all that the tracker claims to see, and what it must refuse.
var kinds = []kind{
	{name: "loop", open: loopDisk},
	{name: "loop-partition", open: func(t *testing.T) target { return onlyPart(loopDisk(t)) }},
	{name: "virtio-blk", open: func(t *testing.T) target { return partitioned(t, scratchDisk(t, "vd*", "")) }},
	{name: "virtio-scsi", open: func(t *testing.T) target { return partitioned(t, scratchDisk(t, "sd*", "QEMU")) }},
	{name: "scsi-debug", open: func(t *testing.T) target { return partitioned(t, scratchDisk(t, "sd*", "scsi_debug")) }},
	{name: "nvme", open: func(t *testing.T) target { return partitioned(t, scratchDisk(t, "nvme*n*", "")) }},
	{name: "nvme-partition", open: func(t *testing.T) target { return onlyPart(partitioned(t, scratchDisk(t, "nvme*n*", ""))) }},
	{name: "nbd", open: func(t *testing.T) target { return whole(nbdDevice(t, truthSize), "512") }},
	{name: "zram", open: func(t *testing.T) target { return whole(zramDevice(t, truthSize), "4k") }, refused: rwPage},
	{name: "brd", open: func(t *testing.T) target { return whole(ramDisk(t), "512") }, refused: rwPage},
	{name: "dm-linear", open: func(t *testing.T) target { return whole(linearDevice(t, truthSize), "512") }},
	// Writes stay in flight for long: what is not marked at completion is lost.
	{name: "dm-delay", open: func(t *testing.T) target { return whole(delayDevice(t, truthSize, 25*time.Millisecond), "512") }},
	{name: "dm-thin", open: func(t *testing.T) target { return whole(thinDevice(t, truthSize), "512") }},
	{name: "dm-crypt", open: func(t *testing.T) target { return whole(cryptDevice(t, truthSize), "512") }},
	{name: "dm-snapshot-origin", open: func(t *testing.T) target { return whole(originDevice(t, truthSize), "512") }},
	{name: "md-raid1", open: func(t *testing.T) target { return whole(mdDevice(t, "1", 2, truthSize), "512") }},
	{name: "md-raid5", open: func(t *testing.T) target { return whole(mdDevice(t, "5", 3, truthSize/2), "512") }},
	{name: "md-raid10", open: func(t *testing.T) target { return whole(mdDevice(t, "10", 2, truthSize), "512") }},
	{name: "md-raid0", open: func(t *testing.T) target { return whole(mdDevice(t, "0", 2, truthSize/2), "512") }, refused: always("md raid0 passes writes on")},
	{name: "md-linear", open: func(t *testing.T) target { return whole(mdDevice(t, "linear", 2, truthSize/2), "512") }, refused: always("md linear passes writes on")},
}

// Every block that was written is in some delta: a replica that is fed from
// the deltas alone equals the disk when the writers have stopped. For every kind of
// device, or it is refused by name.
func TestTruth(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			d := k.open(t)
			_, err := bpf.Lookup(d.dev)
			if k.refused != nil && k.refused() != "" {
				if !errors.Is(err, bpf.ErrUntrackable) || !strings.Contains(err.Error(), k.refused()) {
					t.Fatalf("got %v, want %v because of %q", err, bpf.ErrUntrackable, k.refused())
				}
				t.Log("REFUSED ", err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			testTruth(t, d)
		})
	}
}

// elsewhere skips a kind that this kernel has not got.
func elsewhere(t *testing.T, format string, args ...any) {
	t.Helper()
	t.Skipf("SKIP: "+format+" (make matrix runs it under other kernels)", args...)
}

// scratchDisk finds a disk that the VM harness has attached to be written over: of
// the right name and, if made is not empty, vendor or model.
func scratchDisk(t *testing.T, name, made string) string {
	t.Helper()
	if os.Getenv("TIDEMARK_TESTVM") == "" {
		elsewhere(t, "only a VM has disks that may be written over")
	}
	found, err := filepath.Glob("/sys/block/" + name)
	if err != nil {
		t.Fatal(err)
	}
	for _, sys := range found {
		vendor, _ := os.ReadFile(filepath.Join(sys, "device/vendor"))
		model, _ := os.ReadFile(filepath.Join(sys, "device/model"))
		size, _ := os.ReadFile(filepath.Join(sys, "size"))
		if strings.TrimSpace(string(size)) == fmt.Sprint(truthSize/512) && strings.Contains(string(vendor)+string(model), made) {
			return "/dev/" + filepath.Base(sys)
		}
	}
	elsewhere(t, "no %s %s of %d MiB", name, made, truthSize>>20)
	return ""
}

// partitioned gives a disk two partitions. The kernel may read the table itself or not.
func partitioned(t *testing.T, dev string) target {
	t.Helper()
	c := exec.Command("sfdisk", "-q", dev)
	c.Stdin = strings.NewReader(truthTable())
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	sep := ""
	if last := dev[len(dev)-1]; last >= '0' && last <= '9' {
		sep = "p"
	}
	d := target{dev: dev, disk: dev, parts: [2]string{dev + sep + "1", dev + sep + "2"}, sector: "512"}
	if _, err := os.Stat(d.parts[1]); err != nil {
		if out, err := exec.Command("partx", "-u", dev).CombinedOutput(); err != nil {
			t.Fatalf("partx: %v: %s", err, out)
		}
	}
	t.Cleanup(func() { _ = exec.Command("partx", "-d", dev).Run() })
	return d
}

// ramDisk finds a disk of driver brd.
func ramDisk(t *testing.T) string {
	t.Helper()
	if os.Getenv("TIDEMARK_TESTVM") == "" {
		elsewhere(t, "a RAM disk may hold somebody's data")
	}
	if _, err := os.Stat("/dev/ram0"); err != nil {
		elsewhere(t, "no brd: %v", err)
	}
	return "/dev/ram0"
}

// nbdDevice attaches an export of nbdkit with the kernel's client.
func nbdDevice(t *testing.T, size int64) string {
	t.Helper()
	if _, err := os.Stat("/sys/block/nbd0"); err != nil {
		elsewhere(t, "no NBD client in this kernel")
	}
	for _, tool := range []string{"nbdkit", "nbd-client"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIP: no %s (apt-get install nbdkit nbd-client)", tool)
		}
	}
	const dev = "/dev/nbd0"
	if exec.Command("nbd-client", "-c", dev).Run() == nil {
		t.Skipf("SKIP: %s is in use", dev)
	}
	sock := filepath.Join(t.TempDir(), "s")
	server := exec.CommandContext(t.Context(), "nbdkit", "-f", "-U", sock, "memory", fmt.Sprint(size))
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.Wait() }()
	t.Cleanup(func() { _ = server.Process.Kill(); <-ended })
	for range 100 {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if out, err := exec.Command("nbd-client", "-unix", sock, dev).CombinedOutput(); err != nil {
		t.Fatalf("nbd-client: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("nbd-client", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("nbd-client -d: %v: %s", err, out)
		}
	})
	return dev
}

// mdDevice makes an array of n loop devices of member bytes each.
func mdDevice(t *testing.T, level string, n int, member int64) string {
	t.Helper()
	personalities, err := os.ReadFile("/proc/mdstat")
	if err != nil {
		elsewhere(t, "no md: %v", err)
	}
	// raid5 brings raid4 and raid6.
	has := map[string]string{"linear": "linear"}[level]
	if has == "" {
		has = "raid" + level
	}
	if !slices.Contains(strings.Fields(string(personalities)), "["+has+"]") {
		elsewhere(t, "no md %s in this kernel", has)
	}
	if _, err := exec.LookPath("mdadm"); err != nil {
		t.Skip("SKIP: no mdadm (apt-get install mdadm)")
	}
	dev := ""
	for i := 100; dev == ""; i++ {
		if _, err := os.Stat(fmt.Sprintf("/sys/block/md%d", i)); err != nil {
			dev = fmt.Sprintf("/dev/md%d", i)
		}
	}
	args := []string{"--create", dev, "--run", "--quiet", "--assume-clean", "--metadata=1.2", "--level=" + level, fmt.Sprint("--raid-devices=", n)}
	if level != "0" && level != "linear" {
		args = append(args, "--bitmap=none")
	}
	for range n {
		args = append(args, loopDevice(t, member, ""))
	}
	if out, err := exec.Command("mdadm", args...).CombinedOutput(); err != nil {
		t.Fatalf("mdadm: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("mdadm", "--stop", dev).CombinedOutput(); err != nil {
			t.Errorf("mdadm --stop: %v: %s", err, out)
		}
	})
	return dev
}

func kernelBefore(major, minor int) bool {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		panic(err)
	}
	var a, b int
	_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b)
	return a < major || a == major && b < minor
}
