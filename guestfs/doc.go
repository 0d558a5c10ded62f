// Package guestfs says what is on a guest's disk: which kinds of file systems lie where and in
// what state, and how their files are read.
//
// It hides on-disk signatures. It only ever reads the first bytes of what a guest may have forged, and
// every such reader has a fuzz target; whole file systems are parsed by a kernel
// in a virtual machine of its own (package appliance), which implements [Files].
//
// It may import restore and no other package of Tidemark.
package guestfs
