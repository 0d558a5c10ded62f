// Package agent makes restore points.
//
// It hides how one instant of a running VM's disks is reached (quiesce), in
// which order a device is read and its epochs are swapped, how a guest that was
// paused is resumed whatever happens to this process, and the daemon that does
// all this on a schedule.
//
// It may import cbt, store and internal/qmp, and no other package of Tidemark.
// It doesn't open the tracker: whoever wires it hands in the sources.
package agent
