// Package guestfs reads what is on a guest's disk: partitions, and the kinds and
// states of file systems.
//
// It hides on-disk formats. All that it reads was written by the guest and may be
// hostile: every number is checked, no read leaves the disk, memory and time are
// bounded. It may import restore and no other package of Tidemark.
package guestfs
