// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
//
// What kernel and userspace must agree on; layout.go says the same in Go, and a
// test compares the two. A change that either side would misread raises LAYOUT_VERSION, and so
// does one after which older programs may not be believed: an upgrade goes on with
// them as long as a device is in use.
#pragma once

#define LAYOUT_VERSION 7

#define MAX_DEVICES 256 // slots
#define PLACES 1024	// of the devices table, a power of two
#define PROBES 16	// places looked at for one disk
#define MAX_INFLIGHT 131072 // a power of two
#define INFLIGHT_PROBES 8
#define MAX_DISCARDS 1024
#define MAX_CALLS 32768 // of each tracepoint, a power of two
#define CALL_PROBES 8
#define MAX_WRITERS 8192
#define HEAT_REGIONS 1024 // per slot
#define COPIES 3 // of each program, at most

// Keys of the devices table that are no device number.
#define PLACE_FREE 0
#define PLACE_GONE 1 // was in use: look further

// An epoch is an array of 64-bit words: a header, then the dirty bitmap.
#define HEADER_WORDS 256
#define HDR_TAINT 0  // set by programs; the other words belong to userspace
#define HDR_NUMBER 10 // of the epoch

// Bits of the taint word.
#define TAINT_RANGE (1 << 0)	   // a write past the size the device had
#define TAINT_BITMAP (1 << 1)	   // a bit could not be set
#define TAINT_INFLIGHT (1 << 2)	   // the in-flight table was full
#define TAINT_PASSTHROUGH (1 << 3) // a command that is not a bio
#define TAINT_OPCODE (1 << 4)	   // an operation of unknown range (zone reset, append)
#define TAINT_DISCARDS (1 << 5)	   // a request with too many discards
#define TAINT_UNSEEN (1 << 6)	   // a bio completed whose submission was not seen
#define TAINT_IOCTL (1 << 7)	   // an image file: a request to the file system that may change it
#define TAINT_UNMOUNT (1 << 8)	   // an image file: its file system was unmounted
#define TAINT_FOLIO (1 << 9)	   // an image file: a large page of unknown size was written back
#define TAINT_AUDIT (1 << 30)	   // set by userspace: an audit found a change without a mark

// Words of the host map.
#define HOST_WORDS 8
#define HOST_NO_EPOCH 0	   // a registered device had no epoch
#define HOST_PASSTHROUGH 1 // passthrough on a queue without a disk
#define HOST_WRITERS 2	   // writers that the table had no room for
#define HOST_NVME_OPS 4	   // to 7: what userspace found to be the operations of NVMe admin queues

// Words of the call_counts map: two for each tracepoint, in the order of CALL_*, then userspace's.
#define CALL_WORDS 16
#define CALLS_BEFORE 8 // to 10: what copy 0 had missed just before there was a second one
#define CALLS_UNNOTED 0	 // calls that copy 0 saw and found no place for
#define CALLS_RESCUED 1	 // calls that an earlier copy missed, and a later one saw
#define CALL_QUEUE 0
#define CALL_RQ_COMPLETE 1
#define CALL_BIO_COMPLETE 2

// Ways to break the tracker on purpose, so that tests can see it lose writes.
#define BROKEN_NO_SUBMIT (1 << 0)   // submissions don't mark
#define BROKEN_NO_COMPLETE (1 << 1) // completions don't mark
#define BROKEN_BLIND (1 << 2)	    // every copy returns at once
#define BROKEN_NO_WRITEBACK (1 << 3) // image files: writeback doesn't mark
#define BROKEN_NO_DIRECT (1 << 4)    // image files: the end of direct I/O doesn't mark
