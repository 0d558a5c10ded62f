//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
//
// Marks every granule that a write touches, once when the write is submitted
// and once when it completes, in the bitmap of the device's current epoch.
//
// Every event has up to three identical programs: the kernel drops a tracing program
// that nests with itself on a CPU (prog->active in kernel/bpf/trampoline.c and
// bpf_trace_run), so an event is lost only if all that are attached missed it. Copy 0
// also counts.

#include "mark.h"

char LICENSE[] SEC("license") = "GPL";

// Set before loading.
const volatile __u32 broken = 0; // BROKEN_*, in tests
const volatile __u32 copies = COPIES; // that are attached, the first ones
// Tracepoints can be preempted: programs miss events far more often, and which is written down.
const volatile __u32 preemptible = 0;
// Address of bio_chain_endio (block/bio.c), which ends the parts that were split off a
// bio; 0 if userspace could not find it.
const volatile __u64 chain_endio = 0;

// What is tracked: a disk, or a window of one (a partition). Found by the disk's number:
// from the place it hashes to on, up to the first one that is free, each that has
// the key is one window. Userspace writes key last and removes it first, and
// waits for a grace period before it uses a place again.
struct device {
	__u32 key; // of the whole disk: major << 20 | minor
	__u32 own; // of the partition
	__u32 slot;
	__u32 granule_shift; // log2 of bytes
	__u64 start;	     // of the window, sectors of 512 bytes
	__u64 sectors;
	__u32 heat_shift; // log2 of the sectors of a heat region
	__u32 whole;	  // 1: a write past its end means that it grew
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PLACES);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

struct range {
	__u64 bio; // 0: free
	__u64 sector;
	__u32 bytes;
	__u32 dev;
};

// Writes in flight on bio-based devices, by bio pointer: when such a bio
// completes, its own bi_iter no longer says where it wrote. An array that is hashed by
// hand, because the kernel's hash map cost more than all the rest together. An entry
// lies in one of the INFLIGHT_PROBES places from the one that its bio hashes to. Only
// taking a place needs an atomic: a bio completes after it was queued, and nobody
// else looks for its entry.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_INFLIGHT);
	__type(key, __u32);
	__type(value, struct range);
} inflight SEC(".maps");

static __always_inline __u32 pointer_hash(__u64 pointer)
{
	__u64 low;

	// The verifier lets no arithmetic be done on a pointer, but a copy of half of it
	// is a number.
	asm volatile("r0 = %1\n\tw0 = w0\n\t%0 = r0" : "=r"(low) : "r"(pointer) : "r0");
	return (__u32)low * 2654435761U >> 15;
}

static __always_inline __u32 inflight_place(__u64 bio, __u32 n)
{
	return (pointer_hash(bio) + n) & (MAX_INFLIGHT - 1);
}

// The entry of a bio, or NULL.
static __always_inline struct range *landing(__u64 bio)
{
	for (__u32 n = 0; n < INFLIGHT_PROBES; n++) {
		__u32 i = inflight_place(bio, n);
		struct range *r = bpf_map_lookup_elem(&inflight, &i);

		if (r && r->bio == bio)
			return r;
	}
	return NULL;
}

// Remembers where a bio writes. False if there is no room.
static __always_inline int take_off(__u64 bio, __u64 sector, __u32 bytes, __u32 dev)
{
	struct range *r = landing(bio); // another copy's, or one that was never given back

	for (__u32 n = 0; n < INFLIGHT_PROBES && !r; n++) {
		__u32 i = inflight_place(bio, n);

		r = bpf_map_lookup_elem(&inflight, &i);
		if (r && (r->bio || __sync_val_compare_and_swap(&r->bio, 0, bio)))
			r = NULL;
	}
	if (!r)
		return 0;
	r->sector = sector;
	r->bytes = bytes;
	r->dev = dev;
	return 1;
}

struct call {
	__u64 of;   // the bio or request; 0: free
	__u64 mark; // tells this call from an earlier one of the same
};

// Calls of the tracepoints that copy 0, or a later one, has seen and the last one not yet: see note().
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 3 * MAX_CALLS);
	__type(key, __u32);
	__type(value, struct call);
} calls SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CALL_WORDS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} call_counts SEC(".maps");

static __always_inline void count_call(__u32 tracepoint, __u32 what)
{
	__u32 i = 2 * tracepoint + what;
	__u64 *n = bpf_map_lookup_elem(&call_counts, &i);
	if (n)
		__sync_fetch_and_add(n, 1);
}

// Where tracepoints can be preempted, each copy misses events while a task is stopped in it, but hardly
// ever do all miss the same one. That none was missed by all is shown by a sum: what the kernel says that copy 0 missed is
// what later copies saw without it. So copy 0 leaves a note of each call, whatever it is about; a later one that
// finds none counts the call as rescued, and leaves the note; the last takes it away. One that
// the last copy missed stays until the next call of the same; for that its mark is another. Nobody else calls the
// tracepoint for the same bio or request meanwhile, and what mark is made of does not change.
static __always_inline void note(__u64 of, __u64 mark, __u32 tracepoint, __u32 copy)
{
	struct call *c = NULL;
	__u32 hash;

	if (!preemptible || copies == 1)
		return;
	hash = pointer_hash(of);
	for (__u32 n = 0; n < CALL_PROBES; n++) {
		__u32 i = tracepoint * MAX_CALLS + ((hash + n) & (MAX_CALLS - 1));

		c = bpf_map_lookup_elem(&calls, &i);
		if (c && (c->of == of || (copy == 0 && !c->of && !__sync_val_compare_and_swap(&c->of, 0, of))))
			break;
		c = NULL;
	}
	if (copy == 0) {
		if (c)
			c->mark = mark;
		else
			count_call(tracepoint, CALLS_UNNOTED);
		return;
	}
	if (copy == copies - 1) {
		if (!c || c->mark != mark)
			count_call(tracepoint, CALLS_RESCUED);
		if (c)
			c->of = 0;
		return;
	}
	if (c && c->mark == mark)
		return;
	for (__u32 n = 0; n < CALL_PROBES && !c; n++) {
		__u32 i = tracepoint * MAX_CALLS + ((hash + n) & (MAX_CALLS - 1));

		c = bpf_map_lookup_elem(&calls, &i);
		if (c && (c->of || __sync_val_compare_and_swap(&c->of, 0, of)))
			c = NULL;
	}
	if (!c)
		return; // the last copy counts it
	c->mark = mark;
	count_call(tracepoint, CALLS_RESCUED);
}

static __always_inline void note_bio(struct bio *bio, __u32 tracepoint, __u32 copy)
{
	note((__u64)bio, bio->bi_iter.bi_sector << 20 ^ (__u64)bio->bi_iter.bi_size << 8 ^ bio->bi_opf, tracepoint, copy);
}

static __always_inline __u32 disk_key(struct gendisk *disk)
{
	return (__u32)disk->major << 20 | (__u32)disk->first_minor;
}

static __always_inline __u32 first_place(__u32 key)
{
	return (key * 2654435761U) >> 22; // PLACES is 1 << 10
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

enum kind { SUBMIT, COMPLETE, DIRTY };

struct event {
	__u32 kind;
	__u32 op;
	__u64 sector; // on the whole disk
	__u32 bytes;
	__u32 counts;	  // 1 for copy 0
	__u64 why;	  // taints to set
	struct bio *bios; // to be marked too
};

// The part of an event that lies in a window.
struct part {
	__u64 from; // sectors from the window's start
	__u64 sectors;
	__u64 fresh;
};

static __always_inline void count_event(struct device *d, void *epoch, const struct event *e, const struct part *p)
{
	struct counters *c = bpf_map_lookup_elem(&counts, &d->slot);

	if (!c)
		return;
	if (e->why & TAINT_PASSTHROUGH) {
		c->passthrough++;
		return;
	}
	if (e->kind == COMPLETE) {
		c->completions++;
		c->complete_sectors += p->sectors;
		return;
	}
	c->submits++;
	if (!p->sectors)
		return;
	c->submit_sectors += p->sectors;
	if (op_discards(e->op)) {
		c->discards++;
		c->discard_sectors += p->sectors;
	}
	if (!p->fresh) {
		c->rewrites++;
		c->rewrite_sectors += p->sectors;
	}
	writes(c, d->slot, epoch, p->sectors << 9);
	warm(d->slot, p->from >> d->heat_shift, p->sectors << 9);
}

// Marks what the range covers of the window. False if that is nothing.
static __always_inline int touch(struct device *d, void *epoch, __u64 sector, __u32 bytes, int marks, struct part *p)
{
	__u64 first = sector, end = sector + (bytes >> 9), start = d->start, limit = start + d->sectors;
	__u32 shift = d->granule_shift - 9;

	if (end > limit) {
		// The device grew, or the range is nonsense: userspace must look.
		if (d->whole)
			taint(epoch, TAINT_RANGE);
		end = limit;
	}
	if (first < start)
		first = start;
	if (first >= end)
		return !bytes;
	p->from = first - start;
	p->sectors = end - first;
	if (marks && !mark(epoch, p->from >> shift, (end - 1 - start) >> shift, &p->fresh))
		taint(epoch, TAINT_BITMAP);
	return 1;
}

struct bio_walk {
	struct bio *bio;
	struct device *d;
	void *epoch;
	__u64 sectors; // of the window
	int marks;
};

static long walk_loop(__u32 n, struct bio_walk *w)
{
	struct bio *bio = w->bio;
	struct part p = {};

	if (!bio)
		return 1;
	touch(w->d, w->epoch, BPF_CORE_READ(bio, bi_iter.bi_sector), BPF_CORE_READ(bio, bi_iter.bi_size), w->marks, &p);
	w->sectors += p.sectors;
	w->bio = BPF_CORE_READ(bio, bi_next);
	return 0;
}

// One event on one window.
static __always_inline void one(struct device *d, const struct event *e)
{
	void *epoch = bpf_map_lookup_elem(&epochs, &d->slot);
	int marks = !(broken & (e->kind == SUBMIT ? BROKEN_NO_SUBMIT : BROKEN_NO_COMPLETE));
	struct part p = {};

	if (!epoch) {
		host_add(HOST_NO_EPOCH);
		return;
	}
	if (e->kind == DIRTY) {
		if (e->sector >= d->start && e->sector < d->start + d->sectors)
			dirties(d->slot, epoch, e->bytes);
		return;
	}
	if (e->why)
		taint(epoch, e->why);
	if (e->bios) {
		// Discards that do not touch each other, in one request: also of other windows.
		struct bio_walk w = {.bio = e->bios, .d = d, .epoch = epoch, .marks = marks};

		bpf_loop(MAX_DISCARDS, walk_loop, &w, 0);
		if (w.bio)
			taint(epoch, TAINT_DISCARDS);
		if (!w.sectors)
			return;
		p.sectors = w.sectors;
	} else if (!touch(d, epoch, e->sector, e->bytes, marks, &p)) {
		return;
	}
	if (e->counts)
		count_event(d, epoch, e, &p);
}

struct search {
	struct event e;
	__u32 key; // of the disk
	__u32 place;
	int found;
};

static long search_loop(__u32 n, struct search *s)
{
	struct device *d = bpf_map_lookup_elem(&devices, &s->place);

	if (!d || d->key == PLACE_FREE)
		return 1;
	s->place = (s->place + 1) & (PLACES - 1);
	if (d->key == s->key) {
		one(d, &s->e);
		s->found = 1;
	}
	return 0;
}

// The event on all windows of its disk. False if there are none.
static __always_inline int spread(const struct event *e, __u32 key)
{
	struct search s;
	struct device *d;
	__u32 place = first_place(key);
	int found = 0;

	d = bpf_map_lookup_elem(&devices, &place);
	if (!d || d->key == PLACE_FREE)
		return 0;
	if (d->key == key) {
		one(d, e);
		found = 1;
	}
	// Mostly nothing lies behind it.
	place = (place + 1) & (PLACES - 1);
	d = bpf_map_lookup_elem(&devices, &place);
	if (d && d->key != PLACE_FREE) {
		s.e = *e;
		s.key = key;
		s.place = place;
		s.found = 0;
		bpf_loop(PROBES - 1, search_loop, &s, 0);
		found |= s.found;
	}
	return found;
}

static __always_inline int on_queue(struct bio *bio, __u32 copy)
{
	struct event e = {.kind = SUBMIT, .op = bio->bi_opf & REQ_OP_MASK, .counts = copy == 0};
	struct gendisk *disk;
	__u32 key;

	note_bio(bio, CALL_QUEUE, copy);
	if (!op_writes(e.op) || broken & BROKEN_BLIND)
		return 0;
	disk = bio->bi_bdev->bd_disk;
	key = disk_key(disk);
	if (op_opaque(e.op)) {
		e.why = TAINT_OPCODE;
	} else {
		e.sector = bio->bi_iter.bi_sector;
		e.bytes = bio->bi_iter.bi_size;
	}
	if (!spread(&e, key))
		return 0;
	// Also where it carries no data, such as a flush: that it has an entry tells at
	// its completion that it was seen.
	if (!e.why && disk->fops->submit_bio && !take_off((__u64)bio, e.sector, e.bytes, key)) {
		struct event full = {.kind = SUBMIT, .why = TAINT_INFLIGHT};
		spread(&full, key);
	}
	return 0;
}

// An NVMe admin command that carries no data and may change what disks hold: format,
// sanitize, deletion of namespaces, and all that are not known (NVM Express base specification,
// admin command opcodes).
static __always_inline int nvme_destroys(struct request *rq)
{
	__u64 ops = (__u64)rq->q->mq_ops;
	void *cmd = NULL; // struct nvme_request in drivers/nvme/host/nvme.h begins with it
	__u8 opcode = 0;
	int nvme = 0;

	for (__u32 i = HOST_NVME_OPS; i < HOST_WORDS; i++) {
		__u32 at = i;
		__u64 *known = bpf_map_lookup_elem(&host, &at);
		nvme |= known && *known && *known == ops;
	}
	if (!nvme)
		return 0;
	// blk_mq_rq_to_pdu()
	if (bpf_probe_read_kernel(&cmd, sizeof(cmd), (void *)((__u64)rq + bpf_core_type_size(struct request))) ||
	    bpf_probe_read_kernel(&opcode, sizeof(opcode), cmd))
		return 1;
	if (opcode == 0x82 || opcode == 0x86) // security receive, LBA status
		return 0;
	return opcode >= 0x80 || opcode == 0x0d || opcode == 0x15; // namespace management, attachment
}

static __always_inline int on_rq_complete(struct request *rq, __u32 bytes, __u32 copy)
{
	struct event e = {.kind = COMPLETE, .op = rq->cmd_flags & REQ_OP_MASK, .counts = copy == 0};
	struct gendisk *disk;
	int passthrough = e.op == REQ_OP_DRV_OUT;

	note((__u64)rq, rq->__sector << 20 ^ rq->__data_len, CALL_RQ_COMPLETE, copy);
	if (broken & BROKEN_BLIND)
		return 0;
	// Commands that carry no data count as reads, whatever they do: write zeroes,
	// format, sanitize.
	if (e.op == REQ_OP_DRV_IN && !rq->__data_len)
		passthrough = 1;
	if (!passthrough && (!op_writes(e.op) || !bytes))
		return 0;
	disk = rq->q->disk;
	if (!disk) {
		// A controller-wide queue: it may have written to any device. Without
		// data, it is a keep-alive more often than not.
		if (e.op == REQ_OP_DRV_OUT || nvme_destroys(rq))
			host_add(HOST_PASSTHROUGH);
		return 0;
	}
	if (passthrough) {
		e.why = TAINT_PASSTHROUGH;
	} else if (op_opaque(e.op)) {
		e.why = TAINT_OPCODE;
	} else {
		e.sector = rq->__sector;
		e.bytes = bytes;
		// A request may hold several discards: then its own range says nothing.
		if (e.op == REQ_OP_DISCARD && rq->bio && BPF_CORE_READ(rq, bio, bi_next))
			e.bios = rq->bio;
	}
	spread(&e, disk_key(disk));
	return 0;
}

// A part that was split off a bio has no entry, but its whole does, and ends after it: they
// are chained (bio_chain_endio), and the part lies in the whole. So are bios that follow each other
// (__blkdev_issue_discard): there, one that is spent stands where the next begins.
static __always_inline int split_off(struct bio *bio, __u64 sector, __u32 bytes)
{
	struct range *whole;
	__u64 end;

	if ((__u64)bio->bi_end_io != chain_endio)
		return 0;
	whole = landing((__u64)bio->bi_private);
	if (!whole)
		return 0;
	end = whole->sector + (whole->bytes >> 9);
	if (bytes)
		return sector >= whole->sector && sector < end;
	return sector > whole->sector && sector <= end;
}

static __always_inline int on_bio_complete(struct bio *bio, __u32 copy)
{
	struct event e = {.kind = COMPLETE, .op = bio->bi_opf & REQ_OP_MASK};
	struct gendisk *disk;
	struct range *r;
	__u32 key;

	note_bio(bio, CALL_BIO_COMPLETE, copy);
	if (!op_writes(e.op) || broken & BROKEN_BLIND)
		return 0;
	disk = bio->bi_bdev->bd_disk;
	key = disk_key(disk);
	r = landing((__u64)bio);
	// Of a request-based disk: it never became a request (REQ_NOWAIT), so it wrote nothing.
	if (!r && !disk->fops->submit_bio)
		return 0;
	if (r) {
		key = r->dev;
		e.sector = r->sector;
		e.bytes = r->bytes;
		e.counts = copy == 0;
	} else if (op_opaque(e.op)) {
		e.why = TAINT_OPCODE;
	} else {
		// What is no part was submitted before the device was tracked, or passed on by
		// another: where it wrote is not known.
		e.sector = bio->bi_iter.bi_sector;
		e.bytes = bio->bi_iter.bi_size;
		if (!split_off(bio, e.sector, e.bytes))
			e.why = TAINT_UNSEEN;
	}
	spread(&e, key);
	// The copies run in the order they were attached; the others need the entry
	// until the last has seen it.
	if (r && copy == copies - 1)
		r->bio = 0;
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
	}

COPY(0)
COPY(1)
COPY(2)

// Who dirties pages of a device's own page cache: what writes them later is a kernel
// thread. This names writers and proves nothing, so one copy is enough.
SEC("tp_btf/writeback_dirty_folio")
int BPF_PROG(dirty_folio, struct folio *folio, struct address_space *mapping)
{
	struct inode *inode;
	struct block_device *bdev;
	struct gendisk *disk;
	struct event e = {.kind = DIRTY};

	if (!mapping)
		return 0;
	inode = mapping->host;
	if ((inode->i_mode & S_IFMT) != S_IFBLK)
		return 0;
	// I_BDEV() in block/bdev.c
	bdev = (void *)inode - bpf_core_field_offset(struct bdev_inode, vfs_inode) + bpf_core_field_offset(struct bdev_inode, bdev);
	disk = BPF_CORE_READ(bdev, bd_disk);
	e.sector = BPF_CORE_READ(bdev, bd_start_sect) + (folio->index << (PAGE_SHIFT - 9));
	e.bytes = (folio_pages(folio) ?: 1) << PAGE_SHIFT;
	spread(&e, (__u32)BPF_CORE_READ(disk, major) << 20 | (__u32)BPF_CORE_READ(disk, first_minor));
	return 0;
}
