// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
//
// What kernel and userspace must agree on; layout.go says the same in Go, and a
// test compares the two. Any change raises LAYOUT_VERSION.
#pragma once

#define LAYOUT_VERSION 1

#define MAX_DEVICES 256
#define MAX_INFLIGHT 65536
#define MAX_DISCARDS 1024
#define COPIES 3

// An epoch is an array of 64-bit words: a header, then the dirty bitmap.
#define HEADER_WORDS 64
#define HDR_TAINT 0 // set by programs; the other words belong to userspace

// Bits of the taint word.
#define TAINT_RANGE (1 << 0)	   // a write past the size the device had
#define TAINT_BITMAP (1 << 1)	   // a bit could not be set
#define TAINT_INFLIGHT (1 << 2)	   // the in-flight table was full
#define TAINT_PASSTHROUGH (1 << 3) // a command that is not a bio
#define TAINT_OPCODE (1 << 4)	   // an operation of unknown range (zone reset, append)
#define TAINT_DISCARDS (1 << 5)	   // a request with too many discards
#define TAINT_UNSEEN (1 << 6)	   // a bio completed whose submission was not seen
#define TAINT_AUDIT (1 << 30)	   // set by userspace: an audit found a change without a mark

// Words of the host map.
#define HOST_WORDS 8
#define HOST_NO_EPOCH 0	   // a registered device had no epoch
#define HOST_PASSTHROUGH 1 // passthrough on a queue without a disk
