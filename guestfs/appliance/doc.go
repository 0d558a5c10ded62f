// Package appliance reads the file systems of a guest's disk with a Linux kernel in a virtual machine that has nothing
// to lose: no network, no disk but the point's with a throw-away overlay, little memory, QEMU in its sandbox and without privileges. The kernel
// replays the journals into the overlay; what the host parses is this package's own small protocol.
//
// It hides the kernel and its modules, the initramfs, QEMU and the protocol. It may import guestfs, restore, nbd,
// internal/initramfs and internal/tail.
package appliance
