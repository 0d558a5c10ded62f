// Package nbd serves disks over the Network Block Device protocol.
//
// It hides the protocol: negotiation, replies, flags, limits, and how requests
// are executed. Everything else sees a [Server] with its [Exports]. It may import
// restore and no other package of Tidemark.
//
// The protocol is that of doc/proto.md of github.com/NetworkBlockDevice/nbd, extended
// headers that of its branch extension-ext-header; comments name their sections.
// docs/nbd.md lists what is served, and with whose clients it is tested.
//
// # Exports
//
// [Exports] finds a disk by its name for each client that enters it, and is told when
// the client leaves. [Static] is a fixed set; [Points] is all restore points of a
// repository. An export may have a [History]: what differs from one of its states is
// a metadata context qemu:dirty-bitmap. SET_META_CONTEXT holds the export open, and the
// GO for it takes that one, so that contexts and disk belong together even if the
// name has come to mean another disk in between.
//
// # TLS and access
//
// STARTTLS is served where Server.TLS is set, with certificates of a folder
// ([LoadCertificates]). Exports are asked with what is known of the [Client], and
// [Restrict] hides those that no [Rule] shows it. What was agreed on before TLS is
// forgotten; plain text behind STARTTLS ends the connection. Reads over TLS go
// through memory, as the kernel's sendfile cannot encrypt.
//
// # Execution
//
// Each connection has one goroutine, which reads requests ahead and executes the
// quick ones itself: writes, small reads, and reads of what lies in a plain file
// (sendfile from 64 KiB on). Handing these to other goroutines costs more than
// executing them. Their replies are gathered and leave in one system call when
// no further complete request has come, or 256 KiB are full.
//
// A unix socket without TLS blocks in the kernel instead of the runtime's poller
// while it transmits (unixConn). If it is the only connection with work, and requests
// come within 50 µs, its goroutine looks for the next one for as long before it
// sleeps: a client with one request at a time does half as many again. Payloads from 64 KiB on
// whose disk is a [restore.WriteFiler] go from socket to file by splice, past
// this process; while they come, only heads of requests are read ahead.
//
// What may take long goes to a bounded number of workers, started as needed:
// flush and FUA, trim, zeroes, block status, large reads that are not in a file,
// and small ones too while their moving mean says that they are slow (a cold
// repository or page cache). So replies come in any order, as the protocol allows.
//
// A flush or FUA reply is sent after a Sync that began after the request came;
// every write answered before has returned by then, whoever executed it and on
// whatever connection. Hence clients are told that they may use several.
//
// A client that takes no replies stalls its own connection only, and not for
// longer than Server.WriteTimeout. While a reply is stuck, no request is read: a
// client must take replies while it sends, as the kernel's, QEMU's and libnbd do.
//
// # Limits
//
// Strings have 4096 bytes at most, options 64 KiB (longer ones are refused, beyond
// 1 MiB the client is hung up on), reads and writes 32 MiB; trim, zeroes, cache
// and block status may be as long as the protocol can say, zeroes that must not
// be holes 32 MiB. Requests need no alignment. A block status has at most 2048
// extents of each context, of which 64 can be selected. A connection holds 0.5 MiB,
// plus what Server.MaxInFlight allows, and in the kernel up to 1 MiB of replies (unix
// sockets) and 1 MiB of a large payload; before it has chosen an export it holds some
// 64 KiB. Nothing is allocated because a client announced a length.
//
// What all connections hold is limited by Server.MaxConnections, MaxRequests and
// MaxMemory, and divided among clients so that something is left for the next
// (shares). Who keeps the server waiting is cut off: by HandshakeTimeout until it
// has chosen an export, then by RequestTimeout and WriteTimeout.
package nbd
