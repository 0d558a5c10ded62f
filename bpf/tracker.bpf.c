//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
//
// Marks every granule that a write touches, once when the write is submitted
// and once when it completes, in the bitmap of the device's current epoch.
//
// Every event has three identical programs: the kernel drops a tracing program
// that nests with itself on a CPU (prog->active in kernel/bpf/trampoline.c and
// bpf_trace_run), so an event is lost only if all copies missed it.

#include "kernel.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "layout.h"

char LICENSE[] SEC("license") = "GPL";

struct device {
	__u32 slot;	     // in epochs
	__u32 granule_shift; // log2 of bytes
	__u64 granules;	     // bits in the bitmap
};

// Whole-disk device number (major << 20 | minor) to what is tracked there.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DEVICES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

struct epoch_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__uint(max_entries, HEADER_WORDS + 1);
	__type(key, __u32);
	__type(value, __u64);
};

// The current epoch of each slot: HEADER_WORDS words, then the dirty bitmap.
// Replacing an entry is the epoch swap: the update returns only after an RCU
// grace period (maybe_wait_bpf_programs in kernel/bpf/syscall.c), so that no
// program can still write to the epoch that was taken out.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_DEVICES);
	__type(key, __u32);
	__array(values, struct epoch_map);
} epochs SEC(".maps");

struct range {
	__u64 sector;
	__u32 bytes;
	__u32 dev;
};

// Writes in flight on bio-based devices, by bio pointer: when such a bio
// completes, its own bi_iter no longer says where it wrote.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_INFLIGHT);
	__type(key, __u64);
	__type(value, struct range);
} inflight SEC(".maps");

// What was counted since the programs were loaded, by slot and copy: the
// copies count apart, so that the one that missed least tells the truth.
struct counters {
	__u64 submits;	     // write bios submitted
	__u64 submit_sectors; // of 512 bytes
	__u64 completions;
	__u64 complete_sectors;
	__u64 discards; // discards and write-zeroes submitted
	__u64 passthrough;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_DEVICES *COPIES);
	__type(key, __u32);
	__type(value, struct counters);
} counts SEC(".maps");

// Losses that no device can be blamed for.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HOST_WORDS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} host SEC(".maps");

static __always_inline void host_add(__u32 what)
{
	__u64 *n = bpf_map_lookup_elem(&host, &what);
	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline void taint(void *epoch, __u64 why)
{
	__u32 i = HDR_TAINT;
	__u64 *w = bpf_map_lookup_elem(epoch, &i);
	if (w && (*w & why) != why)
		__sync_fetch_and_or(w, why);
}

struct span {
	void *epoch;
	__u64 first; // granules, inclusive
	__u64 last;
};

// One word of the bitmap. A bit that is set stays set until the epoch is
// closed, so looking first is safe and spares the locked instruction.
static __always_inline long mark_word(void *epoch, __u64 word, __u64 first, __u64 last)
{
	__u32 i = HEADER_WORDS + word;
	__u64 mask = ~0ULL, lo = word * 64;
	__u64 *w = bpf_map_lookup_elem(epoch, &i);

	if (!w)
		return 1;
	if (first > lo)
		mask &= ~0ULL << ((first - lo) & 63);
	if (last < lo + 63)
		mask &= ~0ULL >> ((63 - (last - lo)) & 63);
	if ((*w & mask) != mask)
		__sync_fetch_and_or(w, mask);
	return 0;
}

static long mark_loop(__u32 n, struct span *s)
{
	return mark_word(s->epoch, s->first / 64 + n, s->first, s->last);
}

static __always_inline void mark(void *epoch, struct device *d, __u64 sector, __u64 bytes)
{
	struct span s = {.epoch = epoch};
	__u64 words;

	if (!bytes)
		return;
	s.first = (sector << 9) >> d->granule_shift;
	s.last = ((sector << 9) + bytes - 1) >> d->granule_shift;
	if (s.last >= d->granules) {
		// The device grew, or the range is nonsense: userspace must look.
		taint(epoch, TAINT_RANGE);
		if (s.first >= d->granules)
			return;
		s.last = d->granules - 1;
	}
	words = s.last / 64 - s.first / 64 + 1;
	if (words == 1) {
		if (mark_word(epoch, s.first / 64, s.first, s.last))
			taint(epoch, TAINT_BITMAP);
	} else if (bpf_loop(words, mark_loop, &s, 0) != words) {
		taint(epoch, TAINT_BITMAP);
	}
}

static __always_inline __u32 disk_key(struct gendisk *disk)
{
	return (__u32)disk->major << 20 | (__u32)disk->first_minor;
}

// The device of a key and its current epoch, or NULL if it is not tracked.
static __always_inline struct device *tracked(__u32 key, void **epoch)
{
	struct device *d = bpf_map_lookup_elem(&devices, &key);

	if (!d)
		return NULL;
	*epoch = bpf_map_lookup_elem(&epochs, &d->slot);
	if (!*epoch) {
		host_add(HOST_NO_EPOCH);
		return NULL;
	}
	return d;
}

static __always_inline struct counters *count(struct device *d, __u32 copy)
{
	__u32 i = d->slot * COPIES + copy;
	return bpf_map_lookup_elem(&counts, &i);
}

static __always_inline int op_writes(__u32 op)
{
	return op & 1; // op_is_write() in include/linux/blk_types.h
}

static __always_inline int op_discards(__u32 op)
{
	return op == REQ_OP_DISCARD || op == REQ_OP_SECURE_ERASE || op == REQ_OP_WRITE_ZEROES;
}

// Operations whose range says nothing of what they change.
static __always_inline int op_opaque(__u32 op)
{
	return op_writes(op) && op != REQ_OP_WRITE && !op_discards(op);
}

static __always_inline int on_queue(struct bio *bio, __u32 copy)
{
	struct gendisk *disk;
	struct device *d;
	struct counters *c;
	void *epoch;
	__u32 op = bio->bi_opf & REQ_OP_MASK, key, bytes;
	__u64 sector;

	if (!op_writes(op))
		return 0;
	disk = bio->bi_bdev->bd_disk;
	key = disk_key(disk);
	d = tracked(key, &epoch);
	if (!d)
		return 0;
	if (op_opaque(op)) {
		taint(epoch, TAINT_OPCODE);
		return 0;
	}
	sector = bio->bi_iter.bi_sector;
	bytes = bio->bi_iter.bi_size;
	mark(epoch, d, sector, bytes);

	c = count(d, copy);
	if (c) {
		c->submits++;
		c->submit_sectors += bytes >> 9;
		if (op_discards(op))
			c->discards++;
	}
	// Also where it carries no data, such as a flush: that it has an entry tells at
	// its completion that it was seen.
	if (disk->fops->submit_bio) {
		struct range r = {.sector = sector, .bytes = bytes, .dev = key};
		__u64 ptr = (__u64)bio;

		if (bpf_map_update_elem(&inflight, &ptr, &r, BPF_ANY))
			taint(epoch, TAINT_INFLIGHT);
	}
	return 0;
}

struct bio_walk {
	struct bio *bio;
	struct device *d;
	void *epoch;
};

static long walk_loop(__u32 n, struct bio_walk *w)
{
	struct bio *bio = w->bio;

	if (!bio)
		return 1;
	mark(w->epoch, w->d, BPF_CORE_READ(bio, bi_iter.bi_sector), BPF_CORE_READ(bio, bi_iter.bi_size));
	w->bio = BPF_CORE_READ(bio, bi_next);
	return 0;
}

static __always_inline int on_rq_complete(struct request *rq, __u32 bytes, __u32 copy)
{
	struct gendisk *disk;
	struct device *d;
	struct counters *c;
	void *epoch;
	__u32 op = rq->cmd_flags & REQ_OP_MASK, key;

	if (!op_writes(op) || (!bytes && op != REQ_OP_DRV_OUT))
		return 0;
	disk = rq->q->disk;
	if (!disk) {
		// Counted at issue too: it belongs to both epochs.
		host_add(HOST_PASSTHROUGH);
		return 0;
	}
	key = disk_key(disk);
	d = tracked(key, &epoch);
	if (!d)
		return 0;
	if (op_opaque(op)) {
		taint(epoch, op == REQ_OP_DRV_OUT ? TAINT_PASSTHROUGH : TAINT_OPCODE);
		return 0;
	}
	mark(epoch, d, rq->__sector, bytes);
	if (op == REQ_OP_DISCARD) {
		// A request may hold discards that do not touch each other.
		struct bio_walk w = {.bio = rq->bio, .d = d, .epoch = epoch};

		bpf_loop(MAX_DISCARDS, walk_loop, &w, 0);
		if (w.bio)
			taint(epoch, TAINT_DISCARDS);
	}
	c = count(d, copy);
	if (c) {
		c->completions++;
		c->complete_sectors += bytes >> 9;
	}
	return 0;
}

// Address of bio_chain_endio (block/bio.c), which ends the parts that were split off a
// bio; 0 if userspace could not find it.
const volatile __u64 chain_endio = 0;

static __always_inline int on_bio_complete(struct bio *bio, __u32 copy)
{
	struct device *d;
	struct range *r, saved = {};
	struct counters *c;
	void *epoch;
	__u32 op = bio->bi_opf & REQ_OP_MASK, key;
	__u64 ptr = (__u64)bio, end_io;

	if (!op_writes(op))
		return 0;
	end_io = (__u64)bio->bi_end_io;
	// A part that was split off has no entry, only its own range.
	key = disk_key(bio->bi_bdev->bd_disk);
	saved.sector = bio->bi_iter.bi_sector;
	saved.bytes = bio->bi_iter.bi_size;
	r = bpf_map_lookup_elem(&inflight, &ptr);
	if (r) {
		saved = *r;
		key = saved.dev;
	}
	d = tracked(key, &epoch);
	if (d) {
		if (op_opaque(op)) {
			taint(epoch, TAINT_OPCODE);
		} else {
			mark(epoch, d, saved.sector, saved.bytes);
			// It was submitted before the device was tracked, or passed on by
			// another: where it wrote is not known. A part is covered by
			// its whole, which ends after it.
			if (!r && end_io != chain_endio)
				taint(epoch, TAINT_UNSEEN);
		}
		c = count(d, copy);
		if (c && r) {
			c->completions++;
			c->complete_sectors += saved.bytes >> 9;
		}
	}
	// The copies run in the order they were attached; the others need the entry
	// until the last has seen it.
	if (r && copy == COPIES - 1)
		bpf_map_delete_elem(&inflight, &ptr);
	return 0;
}

static __always_inline int on_rq_issue(struct request *rq, __u32 copy)
{
	struct gendisk *disk;
	struct device *d;
	struct counters *c;
	void *epoch;
	__u32 op = rq->cmd_flags & REQ_OP_MASK, key;

	// Commands that carry no data count as reads, whatever they do: write
	// zeroes, format, sanitize.
	if (op != REQ_OP_DRV_OUT && (op != REQ_OP_DRV_IN || rq->__data_len))
		return 0;
	disk = rq->q->disk;
	if (!disk) {
		// Without data, it is a keep-alive more often than not: see docs/limits.md.
		if (op == REQ_OP_DRV_IN)
			return 0;
		// A controller-wide queue: it may have written to any device.
		host_add(HOST_PASSTHROUGH);
		return 0;
	}
	key = disk_key(disk);
	d = tracked(key, &epoch);
	if (!d)
		return 0;
	taint(epoch, TAINT_PASSTHROUGH);
	c = count(d, copy);
	if (c)
		c->passthrough++;
	return 0;
}

#define COPY(n)                                                                                                   \
	SEC("tp_btf/block_bio_queue")                                                                            \
	int BPF_PROG(bio_queue_##n, struct bio *bio)                                                             \
	{                                                                                                         \
		return on_queue(bio, n);                                                                          \
	}                                                                                                         \
	SEC("tp_btf/block_rq_complete")                                                                          \
	int BPF_PROG(rq_complete_##n, struct request *rq, int error, unsigned int nr_bytes)                      \
	{                                                                                                         \
		return on_rq_complete(rq, nr_bytes, n);                                                           \
	}                                                                                                         \
	SEC("tp_btf/block_bio_complete")                                                                         \
	int BPF_PROG(bio_complete_##n, struct request_queue *q, struct bio *bio)                                 \
	{                                                                                                         \
		return on_bio_complete(bio, n);                                                                   \
	}                                                                                                         \
	SEC("tp_btf/block_rq_issue")                                                                             \
	int BPF_PROG(rq_issue_##n, struct request *rq)                                                           \
	{                                                                                                         \
		return on_rq_issue(rq, n);                                                                        \
	}

COPY(0)
COPY(1)
COPY(2)
