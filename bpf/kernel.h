// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
//
// The few kernel types the tracker reads. Only the fields that are read stand here;
// CO-RE finds their place in the running kernel (include/linux/bvec.h,
// blk_types.h, blkdev.h, blk-mq.h).
#pragma once

#include <stdbool.h>
#include <stddef.h>

typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef signed short __s16;
typedef unsigned int __u32;
typedef signed int __s32;
typedef unsigned long long __u64;
typedef signed long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

// include/uapi/linux/bpf.h
enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
};
#define BPF_ANY 0
#define BPF_NOEXIST 1
#define BPF_F_NO_PREALLOC (1U << 0)
#define BPF_F_MMAPABLE (1U << 10)
#define BPF_F_INNER_MAP (1U << 12)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct block_device_operations {
	void (*submit_bio)(void);
};

struct gendisk {
	int major;
	int first_minor;
	const struct block_device_operations *fops;
};

struct block_device {
	__u64 bd_start_sect;
	struct gendisk *bd_disk;
};

struct bvec_iter {
	__u64 bi_sector; // 512 bytes each
	unsigned int bi_size; // bytes
};

struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	unsigned int bi_opf;
	struct bvec_iter bi_iter;
	void (*bi_end_io)(struct bio *);
	void *bi_private;
};

struct blk_mq_ops;

struct request_queue {
	struct gendisk *disk;
	const struct blk_mq_ops *mq_ops;
};

struct request {
	struct request_queue *q;
	unsigned int cmd_flags;
	unsigned int __data_len; // bytes
	__u64 __sector;
	struct bio *bio;
};

struct task_struct {
	unsigned int flags;
};

struct super_block {
	__u32 s_dev;
};

struct inode {
	unsigned short i_mode;
	struct super_block *i_sb;
	unsigned long i_ino;
	__s64 i_size; // bytes
};

struct bdev_inode { // block/bdev.c
	struct block_device bdev;
	struct inode vfs_inode;
};

struct address_space {
	struct inode *host;
};

struct folio {
	struct address_space *mapping;
	unsigned long index;	      // pages
	unsigned int _folio_nr_pages; // of a large one, 64-bit kernels
};

struct folio___6_15 { // renamed in 6.15
	unsigned int _nr_pages;
};

enum pageflags___any { PG_head___any };

#pragma clang attribute pop

#define PF_KTHREAD 0x00200000 // include/linux/sched.h
#define S_IFMT 00170000
#define S_IFBLK 0060000
#define PAGE_SHIFT 12 // x86-64

// enum req_op, include/linux/blk_types.h
#define REQ_OP_MASK 0xff
#define REQ_OP_WRITE 1
#define REQ_OP_DISCARD 3
#define REQ_OP_SECURE_ERASE 5
#define REQ_OP_WRITE_ZEROES 9
#define REQ_OP_DRV_IN 34
#define REQ_OP_DRV_OUT 35
