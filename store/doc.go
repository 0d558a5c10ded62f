// Package store keeps restore points in a repository.
//
// It hides the repository's format (docs/format.md): grains, packs, map
// nodes, points, compression, hashes, encryption and keys, and the rules that make a reported point
// durable and an unreported one invisible. It knows nothing of virtual machines
// beyond their name, and nothing of kernels or devices.
//
// It may import store/blob and no other package of Tidemark.
//
// Glossary:
//
//   - grain: a piece of a disk of fixed size (64 KiB unless the disk says
//     otherwise), identified by the BLAKE3 hash of its content, keyed in an
//     encrypted repository
//   - pack: an immutable object that holds many grains, or many map nodes
//   - map: the persistent tree that leads from a grain's number to its place
//   - point: the small document that names the root of each disk's map; putting
//     it is the commit
//   - full key, writer's key: what opens an encrypted repository, the latter
//     not for reading content
//   - ring: all keys of a repository, as one of those opens them
package store
