// Package vm describes virtual machines independently of their hypervisor, and
// drives hypervisors.
//
// It hides how a machine is written down for a hypervisor and how that is told
// to run it. A [Config] travels with each restore point; a [Hypervisor] makes a
// machine out of one whose disks lie where the caller says. What a hypervisor
// cannot express is refused with an error that wraps [ErrUnsupported], never
// dropped in silence.
//
// It may import restore, internal/qmp and internal/tail, and no other package of Tidemark.
package vm
