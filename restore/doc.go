// Package restore presents a restore point as a disk.
//
// It hides how a disk is put together from maps and grains ([PointDisk]), the
// cache of decoded grains ([Cache]), read-ahead, the copy-on-write [Overlay] a
// standby writes to, and how a disk is written out ([WriteTo]). Everything that
// shows a point to the outside (nbd, fusefs, vm, the command line) sees a
// [Disk] or the [Catalog] and nothing of the repository.
//
// It may import store and no other package of Tidemark. Its suite of tests for
// disks of any kind is restore/disktest.
package restore
