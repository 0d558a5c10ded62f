package testvm

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
)

//go:embed guest/run.sh
var runInit string

// Buses of scratch disks.
const (
	Virtio = "virtio" // /dev/vda, /dev/vdb, ...; needs module virtio_blk
	NVMe   = "nvme"   // /dev/nvme0n1, /dev/nvme1n1, ...
	SCSI   = "scsi"   // /dev/sda, /dev/sdb, ...; needs modules virtio_scsi and sd_mod
)

// ScratchDisk is a disk that a run may write over: an empty one of its own, or a
// file that stays.
type ScratchDisk struct {
	Size int64  // bytes; not used with Path
	Bus  string // default Virtio
	// Path is a raw image file of the caller's. What the guest has flushed is in it,
	// whatever becomes of QEMU; what it has only written may be.
	Path string
}

// Program is something to run in a guest.
type Program struct {
	Path string   // on the host; copied with its shared libraries
	Args []string // without the name
	Env  []string // "NAME=value", besides the guest's own
}

// Run describes one boot of a throw-away kernel. Kernel and Programs must be set.
type Run struct {
	Kernel   *Kernel
	Programs []Program // run one after the other, in /tmp, all of them

	// Modules to load before, in order, with their dependencies; "null_blk
	// nr_devices=2" gives parameters. Those built into the kernel are skipped,
	// those the kernel has not are an error.
	Modules []string
	// Optional are modules like those, but ones that the kernel has not are named in
	// the result.
	Optional  []string
	Tools     []string          // host programs to be found in the guest's PATH, with their libraries
	Files     map[string]string // path in the guest to file on the host
	Disks     []ScratchDisk
	Accel     string    // default: as Accel finds
	MemoryMiB int       // default 1024
	CPUs      int       // default 2
	Console   io.Writer // gets a copy of the log while it grows
}

// Result is what came out of a Run.
type Result struct {
	Exits []int  // exit status of each program that ended, in order
	Log   []Line // all that was printed
	// Missing are the optional modules that the kernel has not.
	Missing []string
}

// Exit is 0 if all programs exited 0, else the status of the first that did not.
func (r *Result) Exit() int {
	for _, e := range r.Exits {
		if e != 0 {
			return e
		}
	}
	return 0
}

// ErrNoResult is wrapped when the guest ended before all programs had: a panic,
// a program that powered it off, or QEMU could not run.
var ErrNoResult = errors.New("guest ended without a result")

// DefaultModules make loop devices, virtio disks and randomness.
func DefaultModules() []string {
	return []string{"virtio_pci", "virtio_blk", "virtio_rng", "loop"}
}

// RunInKernel boots a kernel with an initramfs of the programs, runs them as
// root and returns how they ended. A program that fails is not an error here: see
// Result.Exit. The error wraps ErrNoResult, or the context's error if that ended
// first; the result has the log then too, and the exits so far.
//
// In the guest, TIDEMARK_TESTVM=1 is set, the usual pseudo file systems
// (bpf, tracing, debug, cgroup2) are mounted, and there is no network but lo.
func RunInKernel(ctx context.Context, r Run) (res *Result, err error) {
	res = &Result{}
	if r.Kernel == nil || len(r.Programs) == 0 {
		return res, errors.New("run in kernel: no kernel or no program")
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("run in kernel %s: %w", r.Kernel.Release, err)
		}
	}()
	if r.MemoryMiB == 0 {
		r.MemoryMiB = 1024
	}
	if r.CPUs == 0 {
		r.CPUs = 2
	}
	if r.Accel == "" {
		if r.Accel, err = Accel(ctx, r.Kernel); err != nil {
			return res, err
		}
	}
	dir, err := os.MkdirTemp("", "tidemark-run")
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	archive := filepath.Join(dir, "initramfs")
	token := rand.Text()[:8]
	if res.Missing, err = r.pack(ctx, archive, token); err != nil {
		return res, err
	}
	disks, err := r.makeDisks(dir)
	if err != nil {
		return res, err
	}

	args := append(machineArgs(r.Accel, r.MemoryMiB, r.CPUs),
		"-device", "virtio-rng-pci", "-kernel", r.Kernel.Image, "-initrd", archive, "-append", kernelArgs)
	p, err := startProcess(ctx, "guest", append(args, disks...), r.Console)
	if err != nil {
		return res, err
	}
	<-p.done
	res.Log, _, _ = p.console.from(0)
	exits, done := parseRun(res.Log, token)
	res.Exits = exits
	if done && len(res.Exits) == len(r.Programs) {
		return res, nil
	}
	if err := ctx.Err(); err != nil {
		return res, p.describe(err)
	}
	for _, l := range res.Log {
		if _, reason, ok := strings.Cut(l.Text, "Kernel panic - "); ok {
			return res, p.describe(fmt.Errorf("%w: kernel panic: %s", ErrNoResult, reason))
		}
	}
	return res, p.describe(ErrNoResult)
}

// parseRun finds the exits in a run's log. The token, new for each run, keeps a
// program from passing for the guest's init, should it print such lines itself.
func parseRun(log []Line, token string) (exits []int, done bool) {
	for _, l := range log {
		// A program may have left its last line without an end.
		i := strings.LastIndex(l.Text, "TIDEMARK-RUN ")
		if i < 0 {
			continue
		}
		f := strings.Fields(l.Text[i:])
		if len(f) < 4 || f[1] != token {
			continue
		}
		n, err := strconv.Atoi(f[3])
		switch {
		case err != nil:
		case f[2] == "done":
			done = n == len(exits)
		case f[2] == "exit" && len(f) == 5 && n == len(exits)+1:
			if status, err := strconv.Atoi(f[4]); err == nil {
				exits = append(exits, status)
			}
		}
	}
	return exits, done
}

// pack makes the initramfs, and says which optional modules are missing.
func (r *Run) pack(ctx context.Context, to, token string) (missing []string, err error) {
	a, err := createInitramfs(to)
	if err != nil {
		return nil, err
	}
	a.Text("run.token", token+"\n", 0o644)
	if err = r.fill(ctx, a); err == nil {
		missing, err = r.packModules(ctx, a)
	}
	if closed := a.close(); err == nil {
		err = closed
	}
	return missing, err
}

func (r *Run) fill(ctx context.Context, a *archive) error {
	busybox, err := lookTool("busybox")
	if err != nil {
		return err
	}
	for _, d := range []string{"sbin", "proc", "sys", "tmp", "run", "mnt", "etc"} {
		a.Dir(d)
	}
	a.Char("dev/console", 5, 1)
	a.Host("bin/busybox", busybox, 0o755)
	a.Text("init", runInit, 0o755)
	for _, tool := range r.Tools {
		host, err := lookTool(tool)
		if err != nil {
			return err
		}
		a.program(ctx, path.Join("sbin", filepath.Base(host)), host)
	}
	var list strings.Builder
	for i, p := range r.Programs {
		name := fmt.Sprintf("programs/%d/%s", i+1, filepath.Base(p.Path))
		a.program(ctx, name, p.Path)
		words := make([]string, 0, len(p.Env)+len(p.Args)+2)
		words = append(words, "env")
		words = append(words, p.Env...)
		words = append(words, "/"+name)
		words = append(words, p.Args...)
		for j, w := range words {
			if strings.ContainsAny(w, "\n\x00") {
				return fmt.Errorf("%s: line ends in arguments are not supported", p.Path)
			}
			if j > 0 {
				list.WriteByte(' ')
			}
			list.WriteString("'" + strings.ReplaceAll(w, "'", `'\''`) + "'")
		}
		list.WriteByte('\n')
	}
	a.Text("run.list", list.String(), 0o644)
	for guest, host := range r.Files {
		st, err := os.Stat(host)
		if err != nil {
			return err
		}
		a.Host(guest, host, int(st.Mode().Perm()))
	}
	return nil
}

// packModules adds the modules and the order in which to load them.
func (r *Run) packModules(ctx context.Context, a *archive) (missing []string, err error) {
	var list strings.Builder
	seen := map[string]bool{}
	for i, m := range slices.Concat(r.Modules, r.Optional) {
		name, params, _ := strings.Cut(m, " ")
		out, err := run(ctx, "", "modprobe", "-d", r.Kernel.Dir, "-S", r.Kernel.Release, "--show-depends", name)
		if err != nil && i >= len(r.Modules) && strings.Contains(err.Error(), "not found") {
			missing = append(missing, name)
			continue
		}
		if err != nil {
			return nil, err
		}
		var files []string
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) >= 2 && f[0] == "insmod" {
				files = append(files, f[1])
			}
		}
		for i, host := range files {
			if seen[host] {
				continue
			}
			seen[host] = true
			guest, err := a.module(ctx, host)
			if err != nil {
				return nil, err
			}
			list.WriteString(guest)
			if i == len(files)-1 && params != "" {
				list.WriteString(" " + params)
			}
			list.WriteByte('\n')
		}
	}
	a.Text("modules.list", list.String(), 0o644)
	return missing, nil
}

// module copies a kernel module. Compressed ones are unpacked: busybox's insmod
// takes plain ones only.
func (a *archive) module(ctx context.Context, host string) (guest string, err error) {
	guest = "/modules/" + filepath.Base(host)
	var plain []byte
	switch ext := filepath.Ext(host); ext {
	case ".xz":
		guest = strings.TrimSuffix(guest, ext)
		plain, err = run(ctx, "", "xz", "-dc", host)
	case ".zst":
		guest = strings.TrimSuffix(guest, ext)
		if plain, err = os.ReadFile(host); err == nil {
			plain, err = decodeZstd(plain)
		}
	default:
		a.Host(guest, host, 0o644)
		return guest, a.Err()
	}
	if err != nil {
		return "", fmt.Errorf("module %s: %w", host, err)
	}
	a.Text(guest, string(plain), 0o644)
	return guest, a.Err()
}

func decodeZstd(b []byte) ([]byte, error) {
	d, err := zstd.NewReader(nil)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.DecodeAll(b, nil)
}

// makeDisks makes the disks that are not there yet, and the arguments that attach them.
func (r *Run) makeDisks(dir string) ([]string, error) {
	var args []string
	for i, d := range r.Disks {
		id := fmt.Sprintf("disk%d", i)
		// Nobody needs a scratch disk after a power failure.
		file, cache := d.Path, "writeback"
		if file == "" {
			file, cache = filepath.Join(dir, id), "unsafe"
			f, err := os.Create(file)
			if err != nil {
				return nil, err
			}
			if err := errors.Join(f.Truncate(d.Size), f.Close()); err != nil {
				return nil, err
			}
		}
		args = append(args, "-drive", fmt.Sprintf("if=none,id=%s,format=raw,cache=%s,discard=unmap,file=%s", id, cache, strings.ReplaceAll(file, ",", ",,")))
		switch d.Bus {
		case Virtio, "":
			args = append(args, "-device", "virtio-blk-pci,serial="+id+",drive="+id)
		case NVMe:
			args = append(args, "-device", "nvme,serial="+id+",drive="+id)
		case SCSI:
			args = append(args, "-device", "virtio-scsi-pci,id=bus-"+id, "-device", "scsi-hd,serial="+id+",bus=bus-"+id+".0,drive="+id)
		default:
			return nil, fmt.Errorf("unknown bus %q", d.Bus)
		}
	}
	return args, nil
}
