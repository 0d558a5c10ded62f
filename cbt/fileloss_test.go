package cbt_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// granuleZero reads the first granule of a file.
func granuleZero(t *testing.T, file string, flags int) []byte {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDONLY|flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	b := aligned(64 << 10)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// lostAfter tells whether the first granule is another one than what was read of it, and no
// delta says so.
func lostAfter(t *testing.T, s *cbt.Tracked, id cbt.ChangeID, file string, was []byte) bool {
	t.Helper()
	d := changes(t, s, id)
	if len(d.Unknown) > 0 {
		t.Fatal("unknown: ", d.Unknown)
	}
	now := granuleZero(t, file, 0)
	if bytes.Equal(now, was) {
		t.Fatal("nothing has changed: nothing was tested")
	}
	return len(d.Extents) == 0 || d.Extents[0].Off != 0
}

// A page that was stored to between the writing back and the swap stays writable. A store to
// it after it was read is marked when writeback takes it; without that mark it is lost.
func TestFileStoreToAWritablePage(t *testing.T) {
	onEach(t, func(t *testing.T, _, dir string) {
		for _, broken := range []bpf.Broken{0, bpf.BrokenNoWriteback} {
			file := imageFile(t, dir, smallImage)
			var between func()
			s := openFile(t, bpf.Options{Dir: pinDir(t), Broken: broken, FileMisses: func(m []uint64) []uint64 {
				// Asked for after the writing back and before the swap, then after it.
				if between != nil {
					between()
					between = nil
				}
				return m
			}}, file)
			id := changes(t, s, cbt.ChangeID{}).ID
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			mem, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			between = func() { mem[0]++ }
			d := changes(t, s, id)
			was := granuleZero(t, file, 0)
			mem[0]++
			lost := lostAfter(t, s, d.ID, file, was)
			switch {
			case broken == 0 && lost:
				t.Error("MISSED: a store to a page that was writable already")
			case broken != 0 && !lost:
				t.Error("without the mark at writeback the store was not lost: the test proves nothing")
			}
			_, _ = unix.Munmap(mem), f.Close()
			_ = s.Untrack()
		}
	})
}

// submit begins a direct write of a page at offset 0 and returns what waits for its end.
func submit(t *testing.T, file string, page []byte) (wait func()) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ctx uint64 // aio_context_t
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&ctx)), 0); errno != 0 {
		t.Fatal("io_setup: ", errno)
	}
	// struct iocb of include/uapi/linux/aio_abi.h
	iocb := make([]byte, 64)
	le := binary.LittleEndian
	le.PutUint16(iocb[16:], 1) // IOCB_CMD_PWRITE
	le.PutUint32(iocb[20:], uint32(f.Fd()))
	le.PutUint64(iocb[24:], uint64(uintptr(unsafe.Pointer(&page[0]))))
	le.PutUint64(iocb[32:], uint64(len(page)))
	one := &iocb[0]
	if n, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, uintptr(ctx), 1, uintptr(unsafe.Pointer(&one))); errno != 0 || n != 1 {
		t.Fatal("io_submit: ", errno)
	}
	return func() {
		event := make([]byte, 32)
		for {
			n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, uintptr(ctx), 1, 1, uintptr(unsafe.Pointer(&event[0])), 0, 0)
			if errno == unix.EINTR {
				continue
			}
			if errno != 0 || n != 1 || le.Uint64(event[16:]) != uint64(len(page)) {
				t.Fatal("io_getevents: ", errno, event)
			}
			break
		}
		_, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, uintptr(ctx), 0, 0)
		_ = f.Close()
	}
}

// setDelay changes how long the writes to a device of delayDevice take.
func setDelay(t *testing.T, dev string, delay time.Duration) {
	t.Helper()
	table, err := exec.Command("dmsetup", "table", dev).Output()
	if err != nil {
		t.Fatal("dmsetup table: ", err)
	}
	f := strings.Fields(string(table))
	f[len(f)-1] = strconv.FormatInt(delay.Milliseconds(), 10)
	for _, args := range [][]string{{"reload", dev, "--table", strings.Join(f, " ")}, {"suspend", dev}, {"resume", dev}} {
		if out, err := exec.Command("dmsetup", args...).CombinedOutput(); err != nil {
			t.Fatalf("dmsetup %v: %v: %s", args, err, out)
		}
	}
}

// A direct write that is in flight across a swap is marked when it lands; without that mark it
// is lost where reads don't wait for it (on btrfs they do).
func TestFileDirectWriteInFlight(t *testing.T) {
	for _, fstype := range fileSystems {
		t.Run(fstype, func(t *testing.T) {
			needsFileHooks(t, fstype)
			dir := mountNew(t, fstype, time.Millisecond, "")
			for _, broken := range []bpf.Broken{0, bpf.BrokenNoDirect} {
				if broken != 0 && fstype == "btrfs" {
					continue
				}
				file := imageFile(t, dir, smallImage)
				s := openFile(t, bpf.Options{Dir: pinDir(t), Broken: broken}, file)
				id := changes(t, s, cbt.ChangeID{}).ID
				setDelay(t, deviceOf(t, dir), 3*time.Second)
				wait := submit(t, file, aligned(4096))
				d := changes(t, s, id)
				was := granuleZero(t, file, syscall.O_DIRECT)
				wait()
				setDelay(t, deviceOf(t, dir), time.Millisecond)
				if fstype == "btrfs" {
					// Its reads wait, so nothing can be lost here; but its end must have been seen.
					if d = changes(t, s, d.ID); d.Evidence.Landed < 8 && broken == 0 {
						t.Errorf("%d sectors were seen to land", d.Evidence.Landed)
					}
					continue
				}
				if now := granuleZero(t, file, syscall.O_DIRECT); bytes.Equal(now, was) {
					t.Log("the write had landed before it was read")
					if broken != 0 {
						t.Skip("SKIP: nothing was in flight")
					}
					continue
				}
				lost := lostAfter(t, s, d.ID, file, was)
				switch {
				case broken == 0 && lost:
					t.Error("MISSED: a direct write that was in flight across a swap")
				case broken != 0 && !lost:
					t.Error("without the mark at its end the write was not lost: the test proves nothing")
				}
				_ = s.Untrack()
			}
		})
	}
}
