// Package testvm runs real virtual machines for tests and for the demo.
//
// It hides how kernels are fetched and cached, how root file systems and
// initramfs archives are made without mounting anything, how QEMU is started,
// watched and ended, and how host block devices are made out of files.
//
// Two things can be run:
//
//   - a source VM ([BuildImage], [Start]) whose disk is a host block device, a
//     file or an NBD export. Its guest writes numbered files for ever, or tells
//     which of them a disk holds; [ParseConsole] understands what it prints.
//   - static programs, mostly Go test binaries, inside a throw-away kernel of
//     the caller's choice ([RunInKernel], commands vmtest and matrix).
//
// Everything needs Linux on amd64 and tools from Debian packages; [Require]
// and [Missing] say which are not there. Nothing is installed: kernels go to the
// folder named by TIDEMARK_CACHE, or the user's cache directory.
//
// It is for tests and the demo only, and imports internal/initramfs and internal/tail alone.
package testvm
