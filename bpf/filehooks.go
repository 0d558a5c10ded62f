package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hook is a program of files.bpf.c and the kernel function it is attached to.
type hook struct{ program, function string }

// fileSystem is what has to be known of one to see all writes to its files.
type fileSystem struct {
	number uint32
	hooks  []hook
	// blind are functions that change files in a way that the programs don't see: a
	// kernel that has one is not trusted.
	blind []string
}

// fileSystems are those whose files can be tracked. The functions are those of Linux 6.1.
// All but folio_clear_dirty_for_io, iomap_dio_complete, xfs_swap_extents and
// ext4_move_extents are called through pointers. These are called from other files than
// the one they stand in, iomap_dio_complete from its own too: a compiler might inline it.
var fileSystems = map[string]fileSystem{
	"ext4": {number: 1, hooks: []hook{
		{"write_enter", "ext4_file_write_iter"},
		{"write_exit", "ext4_file_write_iter"},
		{"dio_end", "ext4_dio_write_end_io"},
		{"clean", "folio_clear_dirty_for_io"},
		{"mkwrite", "ext4_page_mkwrite"},
		{"falloc_enter", "ext4_fallocate"},
		{"falloc_exit", "ext4_fallocate"},
		{"setattr_enter", "ext4_setattr"},
		{"setattr_exit", "ext4_setattr"},
		{"ioctl", "ext4_ioctl"},
		{"compat_ioctl", "ext4_compat_ioctl"},
		{"put_super", "ext4_put_super"},
		{"move_ext", "ext4_move_extents"},
	}},
	"xfs": {number: 2, hooks: []hook{
		{"write_enter", "xfs_file_write_iter"},
		{"write_exit", "xfs_file_write_iter"},
		{"dio_end", "xfs_dio_write_end_io"},
		{"clean", "folio_clear_dirty_for_io"},
		{"mkwrite", "xfs_filemap_page_mkwrite"},
		{"falloc_enter", "xfs_file_fallocate"},
		{"falloc_exit", "xfs_file_fallocate"},
		{"setattr_enter", "xfs_vn_setattr"},
		{"setattr_exit", "xfs_vn_setattr"},
		{"remap_enter", "xfs_file_remap_range"},
		{"remap_exit", "xfs_file_remap_range"},
		{"ioctl", "xfs_file_ioctl"},
		{"compat_ioctl", "xfs_file_compat_ioctl"},
		{"put_super", "xfs_fs_put_super"},
		{"swap_ext", "xfs_swap_extents"},
	}, blind: []string{"xfs_exchange_range", "xfs_dio_zoned_write_end_io"}},
	"btrfs": {number: 3, hooks: []hook{
		{"write_enter", "btrfs_file_write_iter"},
		{"write_exit", "btrfs_file_write_iter"},
		{"dio_complete", "iomap_dio_complete"},
		{"clean", "folio_clear_dirty_for_io"},
		{"mkwrite", "btrfs_page_mkwrite"},
		{"falloc_enter", "btrfs_fallocate"},
		{"falloc_exit", "btrfs_fallocate"},
		{"setattr_enter", "btrfs_setattr"},
		{"setattr_exit", "btrfs_setattr"},
		{"remap_enter", "btrfs_remap_file_range"},
		{"remap_exit", "btrfs_remap_file_range"},
		{"ioctl", "btrfs_ioctl"},
		{"compat_ioctl", "btrfs_compat_ioctl"},
		{"put_super", "btrfs_put_super"},
	}, blind: []string{"btrfs_uring_cmd"}},
}

// fileHooks are the programs attached to one file system.
type fileHooks struct {
	t        *Tracker
	dir      string
	hooks    []hook
	instance uint64
	since    time.Time
	seam     func([]uint64) []uint64

	mu    sync.Mutex
	progs []*ebpf.Program // per hook and copy; none after close, which others may not have noticed
	ids   []uint32        // of their links; who held these would decide when the programs are detached
}

var _ programSet = (*fileHooks)(nil)

func (h *fileHooks) names() []string {
	out := make([]string, len(h.hooks))
	for i, k := range h.hooks {
		out[i] = k.program
	}
	return out
}

// wholeCalls: functions of a file system can be preempted, also between two programs
// that hang on them (kernel/bpf/trampoline.c).
func (h *fileHooks) wholeCalls() bool         { return false }
func (h *fileHooks) vouched() (uint64, error) { return 0, nil }
func (h *fileHooks) instanceID() uint64       { return h.instance }
func (h *fileHooks) attached() time.Time      { return h.since }
func (h *fileHooks) changes() uint64          { return h.t.hookChanges() }

func (h *fileHooks) links() []uint32 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ids
}

func (h *fileHooks) present(missed []uint64) []uint64 { return missed }
func (h *fileHooks) stray([]uint64, uint64) bool      { return false }

func (h *fileHooks) name(i int) string {
	return fmt.Sprintf("%s_%d", h.hooks[i/copies].program, i%copies)
}

func (h *fileHooks) pin(i int) string { return filepath.Join(h.dir, "link-"+h.name(i)) }

func (h *fileHooks) missed() ([]uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.progs) != len(h.hooks)*copies {
		return nil, ErrDetached
	}
	out := make([]uint64, len(h.progs))
	for i, p := range h.progs {
		s, err := p.Stats()
		if err != nil {
			return nil, fmt.Errorf("statistics of %s: %w", h.name(i), err)
		}
		out[i] = s.RecursionMisses
	}
	if h.seam != nil {
		out = h.seam(out)
	}
	return out, nil
}

func (h *fileHooks) intact() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.ids) != len(h.hooks)*copies {
		return false
	}
	for i, id := range h.ids {
		if now, err := pinnedLinkID(h.pin(i)); err != nil || now != id {
			return false
		}
	}
	return true
}

func pinnedLinkID(pin string) (uint32, error) {
	info, err := pinnedLink(pin)
	if err != nil {
		return 0, err
	}
	return uint32(info.ID), nil
}

func (h *fileHooks) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.progs {
		_ = p.Close()
	}
	h.progs, h.ids = nil, nil
}

// letGo closes programs for image files that no open registration uses: who holds them keeps others from
// knowing that they are detached. The caller has locked t.mu.
func (t *Tracker) letGo(set programSet) {
	h, ok := set.(*fileHooks)
	if !ok {
		return
	}
	for r := range t.open {
		if r.programs == set {
			return
		}
	}
	h.close()
	for fs, cached := range t.fileHooks {
		if cached == h {
			delete(t.fileHooks, fs)
		}
	}
}

// unpin detaches them, see unpinHooks.
func (h *fileHooks) unpin() (detached bool, err error) {
	return unpinHooks(filepath.Join(h.dir, "link-*"), detachLimit, func() error { return os.RemoveAll(h.dir) })
}

// Words of a file system's meta map.
const (
	fmetaMagic    = 0
	fmetaInstance = 1
	fmetaSince    = 2
	fmetaLinks    = 3 // copies words per hook
	fmetaWords    = 64
)

// hooks adopts the programs that are attached to a file system, or attaches them if that is
// asked for: then the caller holds the lock of the tracker's directory. Errors wrap
// ErrNoFileHooks where this kernel can't, ErrDetached where they are gone.
func (t *Tracker) hooks(fs string, attach bool) (*fileHooks, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.fileHooks[fs]; h != nil && h.intact() {
		return h, nil
	}
	if _, ok := fileSystems[fs]; !ok {
		return nil, fmt.Errorf("%w: not on %q", ErrNoFileHooks, fs)
	}
	h := &fileHooks{t: t, dir: t.pin("files-" + fs), hooks: fileSystems[fs].hooks, seam: t.options.FileMisses}
	err := h.adopt()
	if err != nil && attach {
		h.close()
		if old := t.fileHooks[fs]; old != nil {
			old.close() // or its programs stay
		}
		t.beginHookChange()
		var known bool // what is attached
		// Of a process that died while it attached them.
		if known, err = h.unpin(); err == nil {
			err = t.attachFiles(fs, h)
		}
		if err != nil {
			h.close()
			detached, e := h.unpin()
			known, err = known && detached, errors.Join(err, e)
		}
		if known {
			t.endHookChange()
		}
	}
	if err != nil {
		h.close()
		return nil, fmt.Errorf("image files on %s: %w", fs, err)
	}
	if old := t.fileHooks[fs]; old != nil {
		old.close()
	}
	t.fileHooks[fs] = h
	return h, nil
}

func (h *fileHooks) adopt() error {
	meta, err := ebpf.LoadPinnedMap(filepath.Join(h.dir, "meta"), nil)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDetached, err)
	}
	defer func() { _ = meta.Close() }()
	m, err := mapArray(meta)
	if err != nil {
		return err
	}
	defer m.close()
	if len(m.words) < fmetaWords || m.words[fmetaMagic] != headerMagic {
		return ErrDetached
	}
	h.instance, h.since = m.words[fmetaInstance], time.Unix(0, int64(m.words[fmetaSince]))
	for i := range len(h.hooks) * copies {
		info, err := pinnedLink(h.pin(i))
		if err != nil {
			return fmt.Errorf("%w: program %s: %w", ErrDetached, h.name(i), err)
		}
		if uint64(info.ID) != m.words[fmetaLinks+i] {
			return fmt.Errorf("%w: program %s was attached again", ErrDetached, h.name(i))
		}
		h.ids = append(h.ids, uint32(info.ID))
		p, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			return fmt.Errorf("program %s: %w", h.name(i), err)
		}
		h.progs = append(h.progs, p)
	}
	return nil
}

// filesSpec is the object with the programs of one file system alone, aimed at its functions.
func filesSpec(fs string) (*ebpf.CollectionSpec, error) {
	spec, err := loadFiles()
	if err != nil {
		return nil, fmt.Errorf("read the embedded object: %w", err)
	}
	hooks := fileSystems[fs].hooks
	for name, p := range spec.Programs {
		i := slices.IndexFunc(hooks, func(h hook) bool { return h.program == name[:strings.LastIndexByte(name, '_')] })
		if i < 0 {
			delete(spec.Programs, name)
			continue
		}
		p.AttachTo = hooks[i].function
	}
	return spec, nil
}

// missing says why the kernel can't be trusted to show all writes to files on fs.
func missing(fs string) error {
	cache := btf.NewCache()
	kernel, err := cache.Kernel()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoBTF, err)
	}
	specs := []*btf.Spec{kernel}
	if module, err := cache.Module(fs); err == nil {
		specs = append(specs, module)
	}
	has := func(function string) bool {
		return slices.ContainsFunc(specs, func(s *btf.Spec) bool {
			var f *btf.Func
			return s.TypeByName(function, &f) == nil
		})
	}
	for _, h := range fileSystems[fs].hooks {
		if !has(h.function) {
			if _, err := os.Stat("/sys/module/" + fs); err != nil && len(specs) == 1 {
				return fmt.Errorf("%s is not loaded, nothing on it is mounted", fs)
			}
			return fmt.Errorf("it has no function %s, or no BTF for it", h.function)
		}
	}
	for _, f := range fileSystems[fs].blind {
		if has(f) {
			return fmt.Errorf("its %s is newer than what is known here (it has %s)", fs, f)
		}
	}
	return nil
}

// CanTrackFiles says why this kernel can't track image files on fs, or nil. It loads a
// program and attaches nothing. Errors wrap ErrNoFileHooks.
func CanTrackFiles(fs string) error {
	if _, ok := fileSystems[fs]; !ok {
		return fmt.Errorf("%w: not on %s", ErrNoFileHooks, fs)
	}
	if err := missing(fs); err != nil {
		return fmt.Errorf("%w: %w", ErrNoFileHooks, err)
	}
	spec, err := filesSpec(fs)
	if err != nil {
		return err
	}
	for name := range spec.Programs {
		if name != "put_super_0" {
			delete(spec.Programs, name)
		}
	}
	coll, err := ebpf.NewCollection(spec)
	if errors.Is(err, os.ErrPermission) && os.Geteuid() == 0 {
		return fmt.Errorf("%w: it refuses BPF programs on its functions (fentry)", ErrNoFileHooks)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoFileHooks, permission(err))
	}
	coll.Close()
	return nil
}

// FileSystems are those whose image files can be tracked where the kernel lets them.
func FileSystems() []string { return []string{"ext4", "xfs", "btrfs"} }

func (t *Tracker) attachFiles(fs string, h *fileHooks) (err error) {
	if err := missing(fs); err != nil {
		return fmt.Errorf("%w: %w", ErrNoFileHooks, err)
	}
	spec, err := filesSpec(fs)
	if err != nil {
		return err
	}
	if err := spec.Variables["broken"].Set(uint32(t.options.Broken)); err != nil {
		return fmt.Errorf("set broken: %w", err)
	}
	shared := map[string]*ebpf.Map{"epochs": t.maps.Epochs, "counts": t.maps.Counts, "host": t.maps.Host, "heat": t.maps.Heat, "writers": t.maps.Writers}
	if err := t.openFiles(); err == nil {
		shared["files"] = t.files
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return fmt.Errorf("%w: load: %w", ErrNoFileHooks, err)
	}
	defer coll.Close()
	if t.files == nil {
		t.files = coll.DetachMap("files")
		if err := t.files.Pin(t.filesPin()); err != nil {
			return fmt.Errorf("pin map files: %w", err)
		}
	}
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		return err
	}
	for i := range len(h.hooks) * copies {
		if err := h.attach(coll, i); err != nil {
			return err
		}
	}
	return h.save()
}

func (h *fileHooks) attach(coll *ebpf.Collection, i int) error {
	p := coll.DetachProgram(h.name(i))
	if p == nil {
		return fmt.Errorf("the embedded object has no program %s", h.name(i))
	}
	h.progs = append(h.progs, p)
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		return fmt.Errorf("%w: attach %s to %s: %w", ErrNoFileHooks, h.name(i), h.hooks[i/copies].function, err)
	}
	defer func() { _ = l.Close() }()
	if err := l.Pin(h.pin(i)); err != nil {
		return fmt.Errorf("pin link of %s: %w", h.name(i), err)
	}
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("link of %s: %w", h.name(i), err)
	}
	h.ids = append(h.ids, uint32(info.ID))
	return nil
}

// save makes the programs complete: without their meta map, nobody adopts them.
func (h *fileHooks) save() error {
	meta, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "tidemark_fmeta", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: fmetaWords, Flags: unix.BPF_F_MMAPABLE,
	})
	if err != nil {
		return fmt.Errorf("meta map: %w", err)
	}
	defer func() { _ = meta.Close() }()
	m, err := mapArray(meta)
	if err != nil {
		return err
	}
	defer m.close()
	h.instance, h.since = random64(), time.Now()
	m.words[fmetaInstance], m.words[fmetaSince] = h.instance, uint64(h.since.UnixNano())
	for i, id := range h.ids {
		m.words[fmetaLinks+i] = uint64(id)
	}
	m.words[fmetaMagic] = headerMagic
	return meta.Pin(filepath.Join(h.dir, "meta"))
}

func (t *Tracker) filesPin() string { return t.pin("map-files") }

// openFiles opens the map of tracked files; os.ErrNotExist if none ever was.
func (t *Tracker) openFiles() error {
	if t.files != nil {
		return nil
	}
	m, err := ebpf.LoadPinnedMap(t.filesPin(), nil)
	if err != nil {
		return err
	}
	t.files = m
	return nil
}

// eachFile calls f for every tracked file until it says false.
func (t *Tracker) eachFile(f func(filesFileKey, filesImage) bool) error {
	t.mu.Lock()
	err := t.openFiles()
	t.mu.Unlock()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("map files: %w", err)
	}
	var k filesFileKey
	var v filesImage
	it := t.files.Iterate()
	for it.Next(&k, &v) {
		if !f(k, v) {
			return nil
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read the files: %w", err)
	}
	return nil
}

func (t *Tracker) findFile(key filesFileKey) (found filesImage, ok bool, err error) {
	err = t.eachFile(func(k filesFileKey, v filesImage) bool {
		if k.Dev == key.Dev && k.Ino == key.Ino {
			found, ok = v, true
		}
		return !ok
	})
	return found, ok, err
}

func (t *Tracker) insertFile(key filesFileKey, v filesImage) error {
	return t.files.Put(key, v)
}

// removeFile makes the programs forget a file, and detaches them with the last one.
func (t *Tracker) removeFile(key filesFileKey, fs string) error {
	if t.files == nil {
		return nil
	}
	if err := t.files.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget the file: %w", err)
	}
	last := true
	err := t.eachFile(func(_ filesFileKey, v filesImage) bool {
		last = v.Fs != fileSystems[fs].number
		return last
	})
	if err != nil || !last {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.beginHookChange()
	if h := t.fileHooks[fs]; h != nil {
		h.close()
		delete(t.fileHooks, fs)
	}
	detached, err := (&fileHooks{dir: t.pin("files-" + fs)}).unpin()
	if detached {
		t.endHookChange()
	}
	return err
}

// FileMisses are the events that the programs for image files on one file system have missed since they were
// attached.
type FileMisses struct {
	FS       string   // its type
	Programs []string // copies of each are attached
	Missed   []uint64 // per program and copy
}

// FileMisses are those of all file systems of which a file is tracked. Beside an error stands what could be read.
func (t *Tracker) FileMisses() (all []FileMisses, err error) {
	for _, fs := range FileSystems() {
		if _, e := os.Stat(t.pin("files-" + fs)); errors.Is(e, os.ErrNotExist) {
			continue
		}
		h, e := t.hooks(fs, false)
		var missed []uint64
		if e == nil {
			missed, e = h.missed()
		}
		if e != nil {
			err = errors.Join(err, e)
			continue
		}
		all = append(all, FileMisses{FS: fs, Programs: h.names(), Missed: missed})
	}
	return all, err
}
