// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
//
// The kernel types that the programs for image files read (include/linux/fs.h, mm_types.h,
// fs/iomap/direct-io.c, fs/xfs/xfs_inode.h). Only the fields that are read stand here.
#pragma once

#define ENOTTY 25
#define TO_END (1ULL << 62) // more bytes than any file has

// include/uapi/linux/falloc.h
#define FALLOC_FL_COLLAPSE_RANGE 0x08
#define FALLOC_FL_INSERT_RANGE 0x20

#define ATTR_SIZE (1 << 3)   // include/linux/fs.h
#define IOCB_APPEND 0x10       // RWF_APPEND
#define IOMAP_DIO_WRITE (1U << 30)

// Requests that change no content.
#define FS_IOC_GETVERSION_ 0x80087601
#define FS_IOC32_GETVERSION_ 0x80047601
#define EXT4_IOC_GETVERSION_ 0x80086603
#define FITRIM_ 0xc0185879
#define XFS_IOC_DIOINFO_ 0x800c581e

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct file {
	struct inode *f_inode;
};

struct dentry {
	struct inode *d_inode;
};

struct iattr {
	unsigned int ia_valid;
	__s64 ia_size;
};

struct kiocb {
	struct file *ki_filp;
	__s64 ki_pos;
	int ki_flags;
};

struct iov_iter {
	size_t count;
};

struct iomap_dio {
	struct kiocb *iocb;
	__s64 size;
	unsigned int flags;
};

struct vm_area_struct {
	struct file *vm_file;
};

struct vm_fault {
	struct vm_area_struct *vma;
	unsigned long pgoff;
};

struct xfs_inode {
	struct inode i_vnode;
};

#pragma clang attribute pop
