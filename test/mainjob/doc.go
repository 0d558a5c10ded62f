// Package mainjob does Tidemark's whole main job on real parts: a source VM that
// runs and writes, the tidemark binary, FUSE, loop mounts, NBD, and standbys that
// boot. The demo shows it to a person, the end-to-end test demands it.
//
// It drives the binary as a user would, and imports no package of Tidemark but
// test/vm.
package mainjob
