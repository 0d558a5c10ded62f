package bpf

import "errors"

// What can keep a device from being tracked. All are wrapped with context.
var (
	ErrPermission    = errors.New("needs root (CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN)")
	ErrNoBTF         = errors.New("the kernel has no BTF (CONFIG_DEBUG_INFO_BTF, /sys/kernel/btf/vmlinux)")
	ErrOldKernel     = errors.New("the kernel is too old: 5.17 is the oldest that has all the tracker needs")
	ErrNotBlock      = errors.New("not a block device")
	ErrUntrackable   = errors.New("writes to it can't be seen by block tracepoints")
	ErrNoFileHooks   = errors.New("this kernel can't track image files")
	ErrNotAttached   = errors.New("no tracker is attached on this host")
	ErrUnusable      = errors.New("a tracker is pinned on this host that this version of tidemark can't use") // is ErrNotAttached too
	ErrNotRegistered = errors.New("not tracked")
	ErrDamaged       = errors.New("its pinned epochs can't be adopted")
	ErrDetached      = errors.New("the tracker was removed or replaced by another process: open it again")
	ErrBusy          = errors.New("in use by another tidemark process")
	ErrFull          = errors.New("no slot free for another device")
)
