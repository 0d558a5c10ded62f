// Package qmp speaks the QEMU Machine Protocol over a unix socket.
//
// It hides the wire format (one JSON object after another), the greeting and
// capability negotiation, the matching of replies to commands, and the few
// commands that Tidemark needs: pausing and resuming a guest, and asking which
// host files its disks are.
//
// The peer is not trusted: messages are bounded in size, and whatever does not
// look like the protocol ends the connection with an error.
//
// It may import no other package of Tidemark.
//
// The protocol is described in QEMU's docs/interop/qmp-spec.rst, the commands in
// its qapi/*.json.
package qmp
