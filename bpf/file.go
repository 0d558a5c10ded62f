package bpf

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/internal/procfs"
)

// File is an image file as the kernel sees it now.
type File struct {
	Path  string // as given
	Size  int64  // bytes
	Inode uint64
	FS    string // type of its file system, such as "xfs"
	Mount string // where that is mounted
	// Handle tells this inode from every other one that has or had its number
	// (name_to_handle_at(2)): it holds the inode's generation, on btrfs the subvolume too.
	Handle string // hex

	dev uint64 // super_block.s_dev, as MKDEV of include/linux/kdev_t.h makes it
}

var _ Target = File{}

// LookupFile describes the image file at path. Errors wrap ErrUntrackable or fs.ErrNotExist.
func LookupFile(path string) (File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return File{}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	f, err := describeFile(fd)
	if err != nil {
		return File{}, fmt.Errorf("%s: %w: %w", path, ErrUntrackable, err)
	}
	f.Path = path
	return f, nil
}

// Of include/uapi/linux/fs.h and stat.h.
const (
	flagJournalData = 0x4000   // FS_JOURNAL_DATA_FL
	attrDAX         = 0x200000 // STATX_ATTR_DAX
)

func describeFile(fd int) (File, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st); err != nil {
		return File{}, fmt.Errorf("statx: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return File{}, errors.New("not a regular file")
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return File{}, errors.New("the kernel does not tell where it is mounted (before 5.8)")
	}
	m, err := mountByID(st.Mnt_id)
	if err != nil {
		return File{}, err
	}
	f := File{Size: int64(st.Size), Inode: st.Ino, FS: m.fstype, Mount: m.dir, dev: m.dev}
	if _, ok := fileSystems[f.FS]; !ok {
		return f, fmt.Errorf("files on %s can't be tracked, those on ext4, xfs and btrfs can", f.FS)
	}
	if st.Attributes&attrDAX != 0 {
		return f, errors.New("it uses DAX, which writes without the page cache")
	}
	if err := f.journalsData(fd); err != nil {
		return f, err
	}
	if err := notSwap(st); err != nil {
		return f, err
	}
	h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return f, fmt.Errorf("its file system gives no handles, by which a file that took its number could be told: %w", err)
	}
	f.Handle = fmt.Sprintf("%x:%s", h.Type(), hex.EncodeToString(h.Bytes()))
	return f, nil
}

// journalsData refuses ext4 files whose data goes through the journal: jbd2 may then write
// a page without folio_clear_dirty_for_io (fs/jbd2/commit.c).
func (f File) journalsData(fd int) error {
	if f.FS != "ext4" {
		return nil
	}
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return fmt.Errorf("flags of the file: %w", err)
	}
	name, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%s", f.Number()))
	if err != nil {
		return fmt.Errorf("device of its file system: %w", err)
	}
	// mountinfo leaves out what is a default of this file system.
	options, err := os.ReadFile(filepath.Join("/proc/fs/ext4", filepath.Base(name), "options"))
	if err != nil {
		return fmt.Errorf("options of its file system: %w", err)
	}
	if flags&flagJournalData != 0 || slices.Contains(strings.Fields(string(options)), "data=journal") {
		return errors.New("its data goes through the journal of ext4 (data=journal, or chattr +j)")
	}
	return nil
}

// notSwap refuses what the kernel writes to without its file system.
func notSwap(st unix.Statx_t) error {
	b, err := os.ReadFile("/proc/swaps")
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel without swap
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		name, _, _ := strings.Cut(line, " ")
		var s unix.Statx_t
		if unix.Statx(unix.AT_FDCWD, procfs.Unescape(name), 0, unix.STATX_INO, &s) == nil &&
			s.Ino == st.Ino && s.Dev_major == st.Dev_major && s.Dev_minor == st.Dev_minor {
			return errors.New("it is used as swap")
		}
	}
	return nil
}

type mount struct {
	dev    uint64
	dir    string
	fstype string
}

// mounts calls f for each line of mountinfo (proc(5)) until it says false.
func mounts(f func(id uint64, m mount) bool) error {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	sc := bufio.NewScanner(file)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 1 {
			continue
		}
		id, err := strconv.ParseUint(left[0], 10, 64)
		if err != nil {
			continue
		}
		var major, minor uint64
		if _, err := fmt.Sscanf(left[2], "%d:%d", &major, &minor); err != nil {
			continue
		}
		if !f(id, mount{dev: major<<20 | minor, dir: procfs.Unescape(left[4]), fstype: right[0]}) {
			break
		}
	}
	return sc.Err()
}

func mountByID(want uint64) (mount, error) {
	var found mount
	err := mounts(func(id uint64, m mount) bool {
		if id == want {
			found = m
		}
		return id != want
	})
	if err == nil && found.fstype == "" {
		err = errors.New("its mount is not one of this process' (another mount namespace)")
	}
	return found, err
}

func isRegular(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// Label implements Target.
func (f File) Label() string { return f.Path }

// Number implements Target.
func (f File) Number() string { return fmt.Sprintf("%d:%d", f.dev>>20, f.dev&(1<<20-1)) }

func (f File) id() uint64 { return f.Inode }

// generation is what stands for Handle in an epoch's header.
func (f File) generation() uint64 {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s", f.dev, f.Handle))
	return binary.LittleEndian.Uint64(sum[:])
}

func (f File) shape(shift uint) shape {
	return shape{
		n: 1, granules: uint64(f.Size+(1<<shift)-1) >> shift, shift: shift, size: f.Size, diskSeq: f.generation(), tracked: uint64(time.Now().UnixNano()),
	}
}

func (f File) changed(since *Epoch) Loss {
	var l Loss
	if f.generation() != since.DiskSeq() {
		l |= LossReplaced
	}
	if f.Size != since.Size() {
		l |= LossResized
	}
	return l
}

func (f File) lookAgain() (Target, error) { return LookupFile(f.Path) }

// kernelSectors: nobody counts what is written to a file.
func (f File) kernelSectors() (uint64, bool) { return 0, false }

func (f File) heatShift() uint32 { return heatShift(uint64(f.Size) / 512) }

func (f File) key() filesFileKey { return filesFileKey{Dev: f.dev, Ino: f.Inode} }

func (f File) find(t *Tracker) (uint32, bool, error) {
	v, ok, err := t.findFile(f.key())
	return v.Slot, ok, err
}

func (f File) insert(t *Tracker, slot uint32, shift uint) error {
	err := t.insertFile(f.key(), filesImage{
		Slot: slot, GranuleShift: uint32(shift), Granules: uint64(f.Size+(1<<shift)-1) >> shift, HeatShift: f.heatShift(),
		Fs: fileSystems[f.FS].number,
	})
	if err != nil {
		return err
	}
	return f.settle()
}

// settle: fallocate and reflink hold the inode's lock, for which lseek (ext4, btrfs)
// and reading (xfs) queue behind them.
func (f File) settle() error {
	file, err := os.Open(f.Path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	if _, err := unix.Seek(int(file.Fd()), 0, unix.SEEK_DATA); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("%s: wait for its lock: %w", f.Path, err)
	}
	if _, err := file.ReadAt(make([]byte, 1), 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: wait for its lock: %w", f.Path, err)
	}
	return nil
}

func (f File) remove(t *Tracker) error { return t.removeFile(f.key(), f.FS) }

func (f File) programs(t *Tracker, attach bool) (programSet, error) {
	h, err := t.hooks(f.FS, attach)
	if err != nil {
		return nil, err // not h: an interface that holds a nil would not be nil
	}
	return h, nil
}
