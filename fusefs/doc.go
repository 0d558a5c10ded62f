// Package fusefs shows the restore points of a repository as a tree of files:
//
//	<vm>/latest                      link to the newest point
//	<vm>/2026-11-22T18-30-00Z/       a point:
//	    disk0.raw                    a disk, byte for byte
//	    disk0.parts/p1.raw           a partition of it
//	    disk0.parts/partitions.json  where they lie
//	    disk0.files/p1/              the guest's own files, if the mount shows them
//	    changes-since-previous.json  where the disks differ from the point before
//	    point.json                   the point's document
//	    vm.json                      the VM's configuration, if the point has one
//
// Points are named by their time in UTC, to the second; points of one second
// have the start of their ID behind it. The tree is read-only for everybody. New points
// appear and deleted ones vanish while it is mounted.
//
// It hides FUSE: nodes, caching in the kernel, mounting with and without
// privilege. It may import restore and guestfs, and no other package of Tidemark.
package fusefs
