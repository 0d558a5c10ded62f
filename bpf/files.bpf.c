//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
//
// Marks every granule of an image file that may have changed, in the bitmap of the
// file's current epoch. The programs hang on the operations of one file system, which
// userspace names before it loads them: those are called through pointers, so that no
// compiler can have inlined them.
//
// What has to hold: after each change of the file's content, a mark is set, no earlier
// than when a read would see the change. Marks before a change are for the epoch in
// which it began.
//
// As with the block programs, every program is attached three times: see tracker.bpf.c.

#include "mark.h"
#include "files.h"

char LICENSE[] SEC("license") = "GPL";

const volatile __u32 broken = 0; // BROKEN_*, in tests

struct file_key {
	__u64 dev; // super_block.s_dev
	__u64 ino;
};

struct image {
	__u32 slot;
	__u32 granule_shift; // log2 of bytes
	__u64 granules;	     // bits in the bitmap
	__u32 heat_shift;    // log2 of the sectors of a heat region
	__u32 fs;	     // which set of programs sees it, for userspace
};

// Inode to what is tracked there.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DEVICES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct file_key);
	__type(value, struct image);
} files SEC(".maps");

// The image file that is tracked at inode and its current epoch, or NULL.
static __always_inline struct image *tracked(struct inode *inode, void **epoch)
{
	struct file_key key = {};
	struct image *f;

	if (!inode || broken & BROKEN_BLIND)
		return NULL;
	key.dev = inode->i_sb->s_dev;
	key.ino = inode->i_ino;
	f = bpf_map_lookup_elem(&files, &key);
	if (!f)
		return NULL;
	*epoch = bpf_map_lookup_elem(&epochs, &f->slot);
	if (!*epoch)
		host_add(HOST_NO_EPOCH);
	return *epoch ? f : NULL;
}

enum side { SUBMIT, COMPLETE };

// Bytes of the file change (SUBMIT) or have changed (COMPLETE). These programs can be
// preempted by each other, hence the atomic additions.
static __always_inline void note(struct inode *inode, __u64 from, __u64 bytes, enum side side, __u32 copy)
{
	void *epoch;
	struct image *f = tracked(inode, &epoch);
	struct counters *c;
	__u64 first, last, fresh = 0;

	if (!f)
		return;
	first = from >> f->granule_shift;
	// What lies behind the end the file had is not in the bitmap: that it grew, its size
	// shows.
	if (bytes && first < f->granules && !(broken & (side == SUBMIT ? BROKEN_NO_SUBMIT : BROKEN_NO_COMPLETE))) {
		last = (from + bytes - 1) >> f->granule_shift;
		if (last >= f->granules)
			last = f->granules - 1;
		if (!mark(epoch, first, last, &fresh))
			taint(epoch, TAINT_BITMAP);
	}
	if (copy)
		return;
	c = bpf_map_lookup_elem(&counts, &f->slot);
	if (!c)
		return;
	if (side == SUBMIT) {
		__sync_fetch_and_add(&c->submits, 1);
		if (bytes >= TO_END)
			return;
		__sync_fetch_and_add(&c->submit_sectors, bytes >> 9);
		writes(c, f->slot, epoch, bytes);
		warm(f->slot, (from >> 9) >> f->heat_shift, bytes);
	} else {
		__sync_fetch_and_add(&c->completions, 1);
		if (bytes < TO_END)
			__sync_fetch_and_add(&c->complete_sectors, bytes >> 9);
	}
}

static __always_inline void note_taint(struct inode *inode, __u64 why, __u32 copy)
{
	void *epoch;
	struct image *f = tracked(inode, &epoch);
	struct counters *c;

	if (!f)
		return;
	taint(epoch, why);
	if (copy)
		return;
	c = bpf_map_lookup_elem(&counts, &f->slot);
	if (c)
		__sync_fetch_and_add(&c->passthrough, 1);
}

// file_operations.write_iter: write(2), io_uring, AIO, splice, loop, nfsd, vhost.
static __always_inline int on_write_enter(struct kiocb *iocb, struct iov_iter *from, __u32 copy)
{
	struct inode *inode = iocb->ki_filp->f_inode;
	__u64 pos = iocb->ki_pos;

	if (iocb->ki_flags & IOCB_APPEND)
		pos = inode->i_size;
	note(inode, pos, from->count, SUBMIT, copy);
	return 0;
}

// A write that goes on alone (EIOCBQUEUED) may have freed iocb by now.
static __always_inline int on_write_exit(struct kiocb *iocb, long ret, __u32 copy)
{
	if (ret <= 0)
		return 0;
	note(iocb->ki_filp->f_inode, iocb->ki_pos - ret, ret, COMPLETE, copy);
	return 0;
}

// iomap_dio_ops.end_io, when it has returned: the data has landed, and what was an unwritten
// extent or a shared one shows it from now on.
static __always_inline int on_dio_end(struct kiocb *iocb, long size, __u32 copy)
{
	if (!(broken & BROKEN_NO_DIRECT))
		note(iocb->ki_filp->f_inode, iocb->ki_pos, size, COMPLETE, copy);
	return 0;
}

// iomap_dio_complete, for file systems without an end_io of their own.
static __always_inline int on_dio_complete(struct iomap_dio *dio, __u32 copy)
{
	if (!(dio->flags & IOMAP_DIO_WRITE) || broken & BROKEN_NO_DIRECT)
		return 0;
	note(dio->iocb->ki_filp->f_inode, dio->iocb->ki_pos, dio->size, COMPLETE, copy);
	return 0;
}

// folio_clear_dirty_for_io, when it has returned: writeback takes the page. Stores through
// a mapping that came before are in it; one that comes later faults again, because the
// page is write-protected now, and makes it dirty again.
static __always_inline int on_clean(struct folio *folio, int was_dirty, __u32 copy)
{
	__u64 mapping, pages;
	struct inode *inode;

	// Of anonymous memory, the low bits are set (include/linux/page-flags.h).
	if (!was_dirty || bpf_core_read(&mapping, sizeof(mapping), &folio->mapping) || !mapping || (mapping & 3))
		return 0;
	inode = folio->mapping->host;
	if (broken & BROKEN_NO_WRITEBACK)
		return 0;
	pages = folio_pages(folio);
	if (!pages) {
		note_taint(inode, TAINT_FOLIO, copy);
		return 0;
	}
	note(inode, folio->index << PAGE_SHIFT, pages << PAGE_SHIFT, COMPLETE, copy);
	return 0;
}

// vm_operations_struct.page_mkwrite: the first store to a page that is clean.
static __always_inline int on_mkwrite(struct vm_fault *vmf, __u32 copy)
{
	note(vmf->vma->vm_file->f_inode, vmf->pgoff << PAGE_SHIFT, 1 << PAGE_SHIFT, SUBMIT, copy);
	return 0;
}

static __always_inline int on_fallocate(struct file *file, int mode, __u64 from, __u64 bytes, enum side side, __u32 copy)
{
	if (mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE))
		bytes = TO_END;
	note(file->f_inode, from, bytes, side, copy);
	return 0;
}

// inode_operations.setattr: truncate, ftruncate, O_TRUNC.
static __always_inline int on_setattr(struct dentry *dentry, struct iattr *attr, enum side side, __u32 copy)
{
	struct inode *inode = dentry->d_inode;
	__u64 from = attr->ia_size, size = inode->i_size;

	if (!(attr->ia_valid & ATTR_SIZE))
		return 0;
	note(inode, from < size ? from : size, TO_END, side, copy);
	return 0;
}

// file_operations.remap_file_range: reflink and deduplication; 0 bytes mean all that follows.
static __always_inline int on_remap(struct file *out, __u64 from, __u64 bytes, enum side side, __u32 copy)
{
	note(out->f_inode, from, bytes ? bytes : TO_END, side, copy);
	return 0;
}

// file_operations.unlocked_ioctl, where the VFS has not handled the request. ENOTTY says
// that the file system knows of no such request.
static __always_inline int on_ioctl(struct file *file, __u32 cmd, long ret, __u32 copy)
{
	if (ret == -ENOTTY)
		return 0;
	switch (cmd) {
	case FS_IOC_GETVERSION_:
	case FS_IOC32_GETVERSION_:
	case EXT4_IOC_GETVERSION_:
	case FITRIM_:
	case XFS_IOC_DIOINFO_:
		return 0;
	}
	note_taint(file->f_inode, TAINT_IOCTL, copy);
	return 0;
}

struct unmount {
	__u64 dev;
};

static long unmount_file(void *map, struct file_key *key, struct image *f, struct unmount *u)
{
	void *epoch;

	if (key->dev != u->dev)
		return 0;
	epoch = bpf_map_lookup_elem(&epochs, &f->slot);
	if (epoch)
		taint(epoch, TAINT_UNMOUNT);
	else
		host_add(HOST_NO_EPOCH);
	return 0;
}

// super_operations.put_super: what happens to a file until it is mounted again is not seen.
static __always_inline int on_put_super(struct super_block *sb)
{
	struct unmount u = {.dev = sb->s_dev};

	bpf_for_each_map_elem(&files, unmount_file, &u, 0);
	return 0;
}

#define COPY(n)                                                                                                   \
	SEC("fentry/write_iter")                                                                                 \
	int BPF_PROG(write_enter_##n, struct kiocb *iocb, struct iov_iter *from)                                 \
	{                                                                                                         \
		return on_write_enter(iocb, from, n);                                                             \
	}                                                                                                         \
	SEC("fexit/write_iter")                                                                                  \
	int BPF_PROG(write_exit_##n, struct kiocb *iocb, struct iov_iter *from, long ret)                        \
	{                                                                                                         \
		return on_write_exit(iocb, ret, n);                                                               \
	}                                                                                                         \
	SEC("fexit/dio_end_io")                                                                                  \
	int BPF_PROG(dio_end_##n, struct kiocb *iocb, long size, int error, unsigned int flags)                  \
	{                                                                                                         \
		return on_dio_end(iocb, size, n);                                                                 \
	}                                                                                                         \
	SEC("fentry/iomap_dio_complete")                                                                         \
	int BPF_PROG(dio_complete_##n, struct iomap_dio *dio)                                                    \
	{                                                                                                         \
		return on_dio_complete(dio, n);                                                                   \
	}                                                                                                         \
	SEC("fexit/folio_clear_dirty_for_io")                                                                    \
	int BPF_PROG(clean_##n, struct folio *folio, bool ret)                                                   \
	{                                                                                                         \
		return on_clean(folio, ret, n);                                                                   \
	}                                                                                                         \
	SEC("fentry/page_mkwrite")                                                                               \
	int BPF_PROG(mkwrite_##n, struct vm_fault *vmf)                                                          \
	{                                                                                                         \
		return on_mkwrite(vmf, n);                                                                        \
	}                                                                                                         \
	SEC("fentry/fallocate")                                                                                  \
	int BPF_PROG(falloc_enter_##n, struct file *file, int mode, __u64 off, __u64 len)                        \
	{                                                                                                         \
		return on_fallocate(file, mode, off, len, SUBMIT, n);                                             \
	}                                                                                                         \
	SEC("fexit/fallocate")                                                                                   \
	int BPF_PROG(falloc_exit_##n, struct file *file, int mode, __u64 off, __u64 len)                         \
	{                                                                                                         \
		return on_fallocate(file, mode, off, len, COMPLETE, n);                                           \
	}                                                                                                         \
	SEC("fentry/setattr")                                                                                    \
	int BPF_PROG(setattr_enter_##n, void *ns, struct dentry *dentry, struct iattr *attr)                     \
	{                                                                                                         \
		return on_setattr(dentry, attr, SUBMIT, n);                                                       \
	}                                                                                                         \
	SEC("fexit/setattr")                                                                                     \
	int BPF_PROG(setattr_exit_##n, void *ns, struct dentry *dentry, struct iattr *attr)                      \
	{                                                                                                         \
		return on_setattr(dentry, attr, COMPLETE, n);                                                     \
	}                                                                                                         \
	SEC("fentry/remap_file_range")                                                                           \
	int BPF_PROG(remap_enter_##n, struct file *in, __u64 pos_in, struct file *out, __u64 pos_out, __u64 len) \
	{                                                                                                         \
		return on_remap(out, pos_out, len, SUBMIT, n);                                                    \
	}                                                                                                         \
	SEC("fexit/remap_file_range")                                                                            \
	int BPF_PROG(remap_exit_##n, struct file *in, __u64 pos_in, struct file *out, __u64 pos_out, __u64 len)  \
	{                                                                                                         \
		return on_remap(out, pos_out, len, COMPLETE, n);                                                  \
	}                                                                                                         \
	SEC("fexit/unlocked_ioctl")                                                                              \
	int BPF_PROG(ioctl_##n, struct file *file, unsigned int cmd, unsigned long arg, long ret)                \
	{                                                                                                         \
		return on_ioctl(file, cmd, ret, n);                                                               \
	}                                                                                                         \
	SEC("fexit/compat_ioctl")                                                                                \
	int BPF_PROG(compat_ioctl_##n, struct file *file, unsigned int cmd, unsigned long arg, long ret)         \
	{                                                                                                         \
		return on_ioctl(file, cmd, ret, n);                                                               \
	}                                                                                                         \
	SEC("fentry/put_super")                                                                                  \
	int BPF_PROG(put_super_##n, struct super_block *sb)                                                      \
	{                                                                                                         \
		return on_put_super(sb);                                                                          \
	}                                                                                                         \
	/* Donors of online defragmentation get other blocks. */                                                 \
	SEC("fexit/ext4_move_extents")                                                                           \
	int BPF_PROG(move_ext_##n, struct file *orig, struct file *donor)                                        \
	{                                                                                                         \
		note_taint(orig->f_inode, TAINT_IOCTL, n);                                                        \
		note_taint(donor->f_inode, TAINT_IOCTL, n);                                                       \
		return 0;                                                                                         \
	}                                                                                                         \
	SEC("fexit/xfs_swap_extents")                                                                            \
	int BPF_PROG(swap_ext_##n, struct xfs_inode *a, struct xfs_inode *b)                                     \
	{                                                                                                         \
		note_taint(&a->i_vnode, TAINT_IOCTL, n);                                                          \
		note_taint(&b->i_vnode, TAINT_IOCTL, n);                                                          \
		return 0;                                                                                         \
	}

COPY(0)
COPY(1)
COPY(2)
