// Package disktest is the conformance suite of [restore.Disk] and
// [restore.WritableDisk]: every implementation runs it. It also has [Bytes], a
// disk in memory, and makes repositories with points, for the tests of packages that need them.
//
// It is imported by tests only, and imports restore and store and no other package of
// Tidemark.
package disktest
