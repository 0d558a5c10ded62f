package bpf

import "sync/atomic"

// Attaching a program to a function of the kernel, or detaching one, replaces the function's trampoline,
// and whoever is in the function then leaves it without any fexit program being called
// (bpf_tramp_image_put in kernel/bpf/trampoline.c): a change whose end nobody marks. All file systems share
// folio_clear_dirty_for_io. So the word hostHooks counts what this tracker does there: odd while it attaches
// or detaches, another number afterwards. An epoch of an image file in which it changed, or was odd,
// is lost. Both change it under the lock of the tracker's directory.

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
