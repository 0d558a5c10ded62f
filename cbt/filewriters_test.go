package cbt_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fileWriters writes to an image file in every way it knows until stop is called, which
// returns what was done. Whoever holds sizes sees a file of its right size.
func fileWriters(t *testing.T, file, fstype string, size int64, sizes *sync.Mutex) (stop func() string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	common := []string{"--filename=" + file, "--output-format=terse", "--terse-version=3", "--time_based", "--runtime=7200", "--norandommap", "--randrepeat=0", "--overwrite=1",
		"--fallocate=none", "--file_append=0", "--randseed=" + strconv.FormatUint(rand.Uint64()>>1, 10)}
	// Direct and buffered writers keep apart: where they meet, the kernel calls the page cache damaged.
	jobs := [][]string{
		{"--name=aio", "--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rate_iops=40"},
		{"--name=direct", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=psync", "--rate_iops=20"},
		{"--name=uring", "--rw=randwrite", "--bs=16k", "--direct=1", "--ioengine=io_uring", "--iodepth=4", "--rate_iops=20"},
		{"--name=buffered", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--ioengine=psync", "--fsync=32", "--rate_iops=20"},
		{"--name=uringbuf", "--rw=randwrite", "--bs=8k", "--ioengine=io_uring", "--iodepth=4", "--rate_iops=20"},
		{"--name=mmap", "--rw=randwrite", "--bs=4k", "--ioengine=mmap", "--rate_iops=20"},
	}
	half := size / 2 &^ (1<<20 - 1)
	var wg sync.WaitGroup
	var mu sync.Mutex
	done := map[string]int{}
	for _, j := range jobs {
		name := j[0]
		if slices.Contains(j, "--direct=1") {
			j = append(j, fmt.Sprintf("--size=%d", half))
		} else { // but for the end, which goes away now and then: SIGBUS
			j = append(j, fmt.Sprintf("--offset=%d", half), fmt.Sprintf("--size=%d", size-half-(1<<20)))
		}
		j = append(j, common...)
		c := exec.CommandContext(ctx, "fio", j...)
		c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
		c.WaitDelay = 20 * time.Second
		wg.Go(func() {
			out, err := c.CombinedOutput()
			n := 0
			for line := range strings.Lines(string(out)) {
				f := strings.Split(line, ";")
				if len(f) > 50 && f[0] == "3" {
					n, _ = strconv.Atoi(f[46])
				}
			}
			mu.Lock()
			defer mu.Unlock()
			done[name] = n
			if n == 0 {
				t.Errorf("fio %s wrote nothing: %v: %s", j[0], err, out)
			}
		})
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	app, err := os.OpenFile(file, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	src, err := os.OpenFile(file+".src", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4<<20)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	if _, err := src.Write(b); err != nil {
		t.Fatal(err)
	}
	block := func() int64 { return rand.Int64N(size/4096-64) * 4096 }
	upper := func() int64 { return half + rand.Int64N((size-half)/4096-64)*4096 }
	few := func() int64 { return 4096 * (1 + rand.Int64N(48)) }
	fd := int(f.Fd())
	ops := []struct {
		name string
		do   func() error
	}{
		{"punch", func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, block(), few())
		}},
		{"punch of bytes", func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, upper()+rand.Int64N(4096), few())
		}},
		{"zero", func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, block(), few())
		}},
		{"allocate", func() error { return unix.Fallocate(fd, 0, block(), few()) }},
		{"collapse and insert", func() error {
			if fstype == "btrfs" {
				return nil
			}
			sizes.Lock()
			defer sizes.Unlock()
			if err := unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, block(), 4096); err != nil {
				return err
			}
			if err := unix.Fallocate(fd, unix.FALLOC_FL_INSERT_RANGE, block(), 4096); err != nil {
				return err
			}
			return f.Truncate(size)
		}},
		{"truncate", func() error {
			sizes.Lock()
			defer sizes.Unlock()
			if err := f.Truncate(size - rand.Int64N(256<<10)); err != nil {
				return err
			}
			return f.Truncate(size)
		}},
		{"append", func() error {
			sizes.Lock()
			defer sizes.Unlock()
			if err := f.Truncate(size - 3000); err != nil {
				return err
			}
			if _, err := app.Write(b[:3000]); err != nil {
				return err
			}
			return f.Truncate(size)
		}},
		{"copy", func() error {
			from, to := rand.Int64N(1<<20), upper()
			_, err := unix.CopyFileRange(int(src.Fd()), &from, fd, &to, int(few()), 0)
			return err
		}},
		{"splice", func() error { // sendfile
			off := rand.Int64N(1 << 20)
			if _, err := f.Seek(upper(), io.SeekStart); err != nil {
				return err
			}
			_, err := unix.Sendfile(fd, int(src.Fd()), &off, int(few()))
			return err
		}},
		{"reflink", func() error {
			if fstype == "ext4" {
				return nil
			}
			n := few()
			return unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{Src_fd: int64(src.Fd()), Src_offset: uint64(rand.Int64N(256) * 4096), Src_length: uint64(n), Dest_offset: uint64(block())})
		}},
	}
	wg.Go(func() {
		defer func() { _, _, _ = f.Close(), app.Close(), src.Close() }()
		for ctx.Err() == nil {
			op := ops[rand.IntN(len(ops))]
			if err := op.do(); err != nil {
				t.Errorf("%s: %v", op.name, err)
				return
			}
			mu.Lock()
			done[op.name]++
			mu.Unlock()
			time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		}
	})
	// A few pages that are stored to all the time: after the first store they do not fault
	// until writeback has taken them.
	wg.Go(func() {
		m, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = m.Close() }()
		const hot = 32
		mem, err := unix.Mmap(int(m.Fd()), half, hot*64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = unix.Munmap(mem) }()
		for i := uint64(1); ctx.Err() == nil; i++ {
			p := int(i%hot) * 64 << 10
			mem[p+rand.IntN(4096)]++
			mu.Lock()
			done["store"]++
			mu.Unlock()
			if i%4 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	})
	return func() string { cancel(); wg.Wait(); return fmt.Sprint(done) }
}
