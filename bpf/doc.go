// Package bpf sees every write to a block device.
//
// It is the only package that knows the kernel: the BPF programs and their
// maps, bpffs pins, tracepoints, device numbers, sysfs. It marks; it doesn't
// judge. Whether an epoch may be believed is decided in package cbt, from the
// evidence that an [Epoch] carries.
//
// What is attached lives in the kernel, pinned below one directory of bpffs:
//
//	gen-N/meta            layout version, boot ID, link IDs; written last
//	gen-N/map-NAME        the maps of tracker.bpf.c
//	gen-N/link-PROGRAM    one link per program and copy
//	gen-N/files-FS/       the same for the programs that see image files on one file system
//	dev-SLOT/eNUMBER      the epochs of one device or file; the number has 16 hex digits
//
// A process that ends, however it ends, leaves all of it working. The next one
// adopts it. State is changed under flock of that directory; one device's
// epochs are used under flock of its own.
//
// File descriptors and mappings belong to the [Tracker], [Registration] or [Epoch] that
// made them and are released by its Close. Of Tidemark it imports
// internal/procfs alone.
package bpf
