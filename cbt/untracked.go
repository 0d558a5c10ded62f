package cbt

import "context"

// Untracked is a Source of a disk whose writes nobody sees: all is unknown, each time.
type Untracked struct {
	Size   int64 // bytes
	Reason string
}

var _ Source = Untracked{}

// Changes implements Source.
func (u Untracked) Changes(ctx context.Context, _ ChangeID) (Delta, error) {
	return Delta{Extents: Whole(u.Size), Unknown: []string{u.Reason}, Evidence: Evidence{Method: "none", Size: u.Size}}, ctx.Err()
}

// Prepare implements Source.
func (u Untracked) Prepare() error { return nil }

// Commit implements Source.
func (u Untracked) Commit(ChangeID) error { return nil }

// Writes implements Source.
func (u Untracked) Writes() (uint64, error) { return 0, ErrUncounted }

// Close implements Source.
func (u Untracked) Close() error { return nil }
