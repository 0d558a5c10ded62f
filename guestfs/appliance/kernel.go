package appliance

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/internal/initramfs"
)

// ErrNoKernel is wrapped when there is no kernel to boot.
var ErrNoKernel = errors.New("no kernel for the appliance that reads guest file systems")

// kernel is what is booted.
type kernel struct {
	image   string
	modules string // directory of modules.dep
}

// needed modules make an appliance; without one of the wanted, a kind of file system can't be read.
var (
	neededModules = []string{"virtio_pci", "virtio_blk", "virtio_console"}
	wantedModules = []string{
		"ext4", "xfs", "btrfs", "ntfs3", "vfat", "exfat", "isofs", "dm_mod",
		"crc32c_generic", "sha256_generic", "blake2b_generic", "xxhash_generic",
		"nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8",
	}
)

// findKernel takes the one that is asked for, "VMLINUZ" or "VMLINUZ:MODULES", or the host's newest.
func findKernel(spec string) (kernel, error) {
	if spec != "" {
		image, modules, given := strings.Cut(spec, ":")
		if !given {
			release := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
			modules = filepath.Join("/lib/modules", release)
			// An unpacked package has them beside /boot.
			if beside := filepath.Join(filepath.Dir(filepath.Dir(image)), "lib/modules", release); isFile(filepath.Join(beside, "modules.dep")) {
				modules = beside
			}
		}
		k := kernel{image, modules}
		if err := k.check(); err != nil {
			return kernel{}, fmt.Errorf("%w: %s: %w", ErrNoKernel, spec, err)
		}
		return k, nil
	}
	images, _ := filepath.Glob("/boot/vmlinuz-*")
	slices.SortFunc(images, func(a, b string) int { return -compareVersions(a, b) })
	var reasons []string
	for _, image := range images {
		k := kernel{image, filepath.Join("/lib/modules", strings.TrimPrefix(filepath.Base(image), "vmlinuz-"))}
		err := k.check()
		if err == nil {
			return k, nil
		}
		reasons = append(reasons, err.Error())
	}
	return kernel{}, fmt.Errorf("%w: /boot has no vmlinuz-* with modules in /lib/modules (%s): install one (Debian: linux-image-cloud-amd64), or name one with --appliance-kernel VMLINUZ[:MODULESDIR]",
		ErrNoKernel, strings.Join(append(reasons, fmt.Sprintf("%d looked at", len(images))), "; "))
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

func (k kernel) check() error {
	if !isFile(k.image) {
		return fmt.Errorf("%s is no file", k.image)
	}
	m, err := readModules(k.modules)
	if err != nil {
		return err
	}
	for _, name := range neededModules {
		if !m.has(name) {
			return fmt.Errorf("%s has no module %s", k.modules, name)
		}
	}
	return nil
}

// compareVersions compares digits as numbers.
func compareVersions(a, b string) int {
	split := func(s string) []string {
		return strings.FieldsFunc(s, func(r rune) bool { return r == '.' || r == '-' || r == '+' || r == '_' })
	}
	return slices.CompareFunc(split(a), split(b), func(x, y string) int {
		i, err1 := strconv.Atoi(x)
		j, err2 := strconv.Atoi(y)
		if err1 == nil && err2 == nil {
			return i - j
		}
		return strings.Compare(x, y)
	})
}

// modules is what depmod(8) wrote down.
type modules struct {
	dir     string
	path    map[string]string   // by name, relative to dir
	deps    map[string][]string // paths, by name; the last comes first
	builtin map[string]bool
}

func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func readModules(dir string) (*modules, error) {
	m := &modules{dir: dir, path: map[string]string{}, deps: map[string][]string{}, builtin: map[string]bool{}}
	dep, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(dep)) {
		path, deps, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		name := moduleName(path)
		m.path[name] = path
		m.deps[name] = strings.Fields(deps)
	}
	// Without it nothing is known to be built in.
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for path := range strings.FieldsSeq(string(builtin)) {
		m.builtin[moduleName(path)] = true
	}
	return m, nil
}

func (m *modules) has(name string) bool { return m.builtin[name] || m.path[name] != "" }

// order is the paths of these modules and of what they need, in the order of loading.
func (m *modules) order(names []string) []string {
	var order []string
	seen := map[string]bool{}
	add := func(path string) {
		if path != "" && !seen[path] {
			seen[path] = true
			order = append(order, path)
		}
	}
	for _, name := range names {
		for _, d := range slices.Backward(m.deps[name]) {
			add(d)
		}
		add(m.path[name])
	}
	return order
}

// plain is a module's content, unpacked.
func (m *modules) plain(ctx context.Context, path string) ([]byte, error) {
	host := filepath.Join(m.dir, path)
	switch filepath.Ext(host) {
	case ".xz":
		c := exec.CommandContext(ctx, "xz", "-dc", host)
		var why bytes.Buffer
		c.Stderr = &why
		b, err := c.Output()
		if err != nil {
			return nil, fmt.Errorf("xz -dc %s: %w: %s (Debian: xz-utils)", host, err, why.Bytes())
		}
		return b, nil
	case ".zst":
		b, err := os.ReadFile(host)
		if err != nil {
			return nil, err
		}
		d, err := zstd.NewReader(nil)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return d.DecodeAll(b, nil)
	}
	return os.ReadFile(host)
}

// writeInitramfs packs this program as /init, and the modules.
func writeInitramfs(ctx context.Context, w io.Writer, program string, k kernel) error {
	m, err := readModules(k.modules)
	if err != nil {
		return err
	}
	a := initramfs.New(w)
	for _, d := range []string{"dev", "proc", "sys", "mnt"} {
		a.Dir(d)
	}
	a.Char("dev/console", 5, 1)
	if err := addProgram(a, program); err != nil {
		return err
	}
	// Acceleration comes last in the list and may fail to load.
	names := slices.Concat(neededModules[:2], wantedModules[8:], neededModules[2:], wantedModules[:8])
	var list strings.Builder
	for _, path := range m.order(names) {
		b, err := m.plain(ctx, path)
		if err != nil {
			return fmt.Errorf("module: %w", err)
		}
		name, _, _ := strings.Cut(filepath.Base(path), ".ko")
		name = "/modules/" + name + ".ko"
		a.Text(name, string(b), 0o644)
		list.WriteString(name + "\n")
	}
	a.Text(modulesList, list.String(), 0o644)
	return a.Close()
}

// addProgram adds the program, and the libraries that it was linked with, if it was.
func addProgram(a *initramfs.Writer, program string) error {
	a.Host("init", program, 0o755)
	f, err := elf.Open(program)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is linked dynamically: build it with CGO_ENABLED=0", program)
		}
	}
	return nil
}

// memoryFile is a file without a name that holds what fill writes. QEMU, which may not read the host's files, opens it
// through the descriptor that it inherits.
func memoryFile(name string, fill func(io.Writer) error) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	w := bufio.NewWriterSize(f, 1<<20)
	err = errors.Join(fill(w), w.Flush())
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
