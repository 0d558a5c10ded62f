package bpf

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Attaching a program to a function of the kernel, or detaching one, replaces the function's trampoline,
// and whoever is in the function then leaves it without any fexit program being called
// (bpf_tramp_image_put in kernel/bpf/trampoline.c): a change whose end nobody marks. All file systems share
// folio_clear_dirty_for_io. So the word hostHooks counts what this tracker does there: odd while it attaches
// or detaches, another number afterwards. An epoch of an image file in which it changed, or was odd,
// is lost. Both change it under the lock of the tracker's directory. It stays odd as long as it is not known that
// programs are detached, until the tracker is opened again.

func (t *Tracker) hookChanges() uint64 { return atomic.LoadUint64(&t.hostMap.words[hostHooks]) }

// beginHookChange comes before programs of image files are attached or detached.
func (t *Tracker) beginHookChange() {
	w := &t.hostMap.words[hostHooks]
	atomic.StoreUint64(w, (atomic.LoadUint64(w)+1)|1)
}

// endHookChange comes after that, also in place of a process that died on the way.
func (t *Tracker) endHookChange() {
	if n := t.hookChanges(); n%2 == 1 {
		atomic.StoreUint64(&t.hostMap.words[hostHooks], n+1)
	}
}

// hooksChanged tells whether programs may have been attached or detached between two readings of hookChanges.
func hooksChanged(was, is uint64) bool { return was != is || is%2 == 1 }

// detachLimit is how long the kernel is waited for to detach programs: each takes a worker thread and grace periods.
const detachLimit = 10 * time.Second

// unpinHooks calls remove, which unpins the links that match the pattern. That does not
// detach their programs: the kernel does so later (bpf_free_inode and bpf_link_put_deferred in kernel/bpf), and drops
// a program only after that. Detached tells that all are gone. If not, it took longer than limit, or somebody
// else has one open: bpftool, say, or a process that adopted it.
func unpinHooks(pattern string, limit time.Duration, remove func() error) (detached bool, err error) {
	pins, err := filepath.Glob(pattern)
	if err != nil {
		return false, err
	}
	detached = true
	var left []ebpf.ProgramID
	for _, pin := range pins {
		info, err := pinnedLink(pin)
		if err != nil {
			detached = detached && errors.Is(err, os.ErrNotExist)
			continue
		}
		left = append(left, info.Program)
	}
	if err := remove(); err != nil {
		return false, err
	}
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		for len(left) > 0 {
			p, err := ebpf.NewProgramFromID(left[0])
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return false, nil // the pins are removed; that programs are detached is not known
			}
			if err == nil {
				_ = p.Close()
				break
			}
			left = left[1:]
		}
		if len(left) == 0 || time.Since(begin) > limit {
			return detached && len(left) == 0, nil
		}
	}
}

func pinnedLink(pin string) (*link.Info, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = l.Close() }()
	return l.Info()
}
