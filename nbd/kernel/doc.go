// Package kernel makes NBD exports block devices of this host: /dev/nbdN, by the
// kernel's own client.
//
// It hides how that client is told what to do (generic netlink, family "nbd":
// include/uapi/linux/nbd-netlink.h and drivers/block/nbd.c), how its connections are
// replaced when they die, and how one learns that somebody else has detached the
// device. Everything else sees [Attach] and a [Device]. It may import nbd and no
// other package of Tidemark.
//
// The kernel's client speaks the transmission phase only, with simple replies and without
// TLS. So a connection is negotiated here ([nbd.Negotiate]) and then given away: data
// doesn't pass through this process. It holds a second descriptor of each socket, to see
// it die. When it does, the requests that were sent over it are sent again over another one:
// at once if they could not leave, else when they are [Options].Timeout old. While there is
// no other, the kernel holds back all requests for [Options].DeadConn, then fails them.
//
// Nothing ends when this process is killed: the device goes on as it is, and a new process can
// take it over ([Options].Backend).
package kernel
