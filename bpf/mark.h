// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
//
// Marking a range of bytes in the current epoch of a slot, and counting it.
#pragma once

#include "kernel.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "layout.h"

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

// What the first copies counted since the slot was taken. An event that they missed
// is in the kernel's count of misses.
struct counters {
	__u64 submits;	     // write bios submitted
	__u64 submit_sectors; // of 512 bytes
	__u64 completions;
	__u64 complete_sectors;
	__u64 discards; // discards and write-zeroes submitted
	__u64 discard_sectors;
	__u64 rewrites; // submissions whose granules were all marked already
	__u64 rewrite_sectors;
	__u64 passthrough;
	// What the last writer on this processor submitted, until another one comes: then
	// it goes to the map writers.
	__u64 writer_epoch;
	__u64 writer_writes;
	__u64 writer_bytes;
	__u32 writer_tgid;
	__u32 writer_kernel;
	char writer_comm[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_DEVICES);
	__type(key, __u32);
	__type(value, struct counters);
} counts SEC(".maps");

// Bytes written to each region of each slot. Processors may overwrite each other's
// additions: it is a picture, not evidence.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_DEVICES *HEAT_REGIONS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} heat SEC(".maps");

// Who wrote to a slot in an epoch.
struct writer_key {
	__u64 epoch;
	__u32 slot;
	__u32 tgid;
};

struct writer {
	__u64 writes;
	__u64 bytes;   // submitted by it
	__u64 dirtied; // bytes of the page cache that it dirtied
	char comm[16];
	__u64 kernel; // 1: a kernel thread
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_WRITERS);
	__type(key, struct writer_key);
	__type(value, struct writer);
} writers SEC(".maps");

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

// One word of the bitmap; granules first to last, inclusive. A bit that is set stays set
// until the epoch is closed, so looking first is safe and spares the locked instruction.
// Adds to *fresh the bits that were not set. True if the word is not there.
static __always_inline long mark_word(void *epoch, __u64 word, __u64 first, __u64 last, __u64 *fresh)
{
	__u32 i = HEADER_WORDS + word;
	__u64 mask = ~0ULL, lo = word * 64, missing;
	__u64 *w = bpf_map_lookup_elem(epoch, &i);

	if (!w)
		return 1;
	if (first > lo)
		mask &= ~0ULL << ((first - lo) & 63);
	if (last < lo + 63)
		mask &= ~0ULL >> ((63 - (last - lo)) & 63);
	missing = mask & ~*w;
	if (missing) {
		__sync_fetch_and_or(w, mask);
		*fresh |= missing;
	}
	return 0;
}

struct span {
	void *epoch;
	__u64 first;
	__u64 last;
	__u64 fresh;
};

static long mark_loop(__u32 n, struct span *s)
{
	return mark_word(s->epoch, s->first / 64 + n, s->first, s->last, &s->fresh);
}

// Marks granules first to last. False if a bit could not be set.
static __always_inline int mark(void *epoch, __u64 first, __u64 last, __u64 *fresh)
{
	__u64 words = last / 64 - first / 64 + 1;
	struct span s;
	int done;

	if (words == 1)
		return !mark_word(epoch, first / 64, first, last, fresh);
	s.epoch = epoch;
	s.first = first;
	s.last = last;
	s.fresh = 0;
	done = bpf_loop(words, mark_loop, &s, 0) == words;
	*fresh = s.fresh;
	return done;
}

static __always_inline __u64 number_of(void *epoch)
{
	__u32 i = HDR_NUMBER;
	__u64 *n = bpf_map_lookup_elem(epoch, &i);
	return n ? *n : 0;
}

static __always_inline void add_writer(struct writer_key *k, struct writer *more)
{
	struct writer *w = bpf_map_lookup_elem(&writers, k);

	if (!w) {
		if (!bpf_map_update_elem(&writers, k, more, BPF_NOEXIST))
			return;
		w = bpf_map_lookup_elem(&writers, k); // another processor was faster
		if (!w) {
			host_add(HOST_WRITERS);
			return;
		}
	}
	__sync_fetch_and_add(&w->writes, more->writes);
	__sync_fetch_and_add(&w->bytes, more->bytes);
	__sync_fetch_and_add(&w->dirtied, more->dirtied);
}

static __always_inline int kernel_thread(void)
{
	return (bpf_get_current_task_btf()->flags & PF_KTHREAD) != 0;
}

static __always_inline __u32 current_tgid(void)
{
	return bpf_get_current_pid_tgid() >> 32;
}

// The current task submits bytes to the slot.
static __always_inline void writes(struct counters *c, __u32 slot, void *epoch, __u64 bytes)
{
	__u64 number = number_of(epoch);
	__u32 tgid = current_tgid();

	if (c->writer_tgid != tgid || c->writer_epoch != number) {
		if (c->writer_writes) {
			struct writer_key k = {.epoch = c->writer_epoch, .slot = slot, .tgid = c->writer_tgid};
			struct writer w = {.writes = c->writer_writes, .bytes = c->writer_bytes, .kernel = c->writer_kernel};

			__builtin_memcpy(w.comm, c->writer_comm, sizeof(w.comm));
			add_writer(&k, &w);
		}
		c->writer_epoch = number;
		c->writer_tgid = tgid;
		c->writer_kernel = kernel_thread();
		c->writer_writes = c->writer_bytes = 0;
		bpf_get_current_comm(c->writer_comm, sizeof(c->writer_comm));
	}
	c->writer_writes++;
	c->writer_bytes += bytes;
}

// The current task dirties bytes of the slot's page cache.
static __always_inline void dirties(__u32 slot, void *epoch, __u64 bytes)
{
	struct writer_key k = {.epoch = number_of(epoch), .slot = slot, .tgid = current_tgid()};
	struct writer w = {.dirtied = bytes, .kernel = kernel_thread()};

	bpf_get_current_comm(w.comm, sizeof(w.comm));
	add_writer(&k, &w);
}

static __always_inline void warm(__u32 slot, __u64 region, __u64 bytes)
{
	__u32 i = slot * HEAT_REGIONS + (region & (HEAT_REGIONS - 1));
	__u64 *h = bpf_map_lookup_elem(&heat, &i);
	if (h)
		*h += bytes;
}
