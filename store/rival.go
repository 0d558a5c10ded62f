package store

import (
	"context"
	"fmt"
)

// rival makes sure that no other backup of the VM has published a point since Begin. Where
// storage has locks there can't be any. Where it has none (S3), this finds all but those that
// publish in the same moment; then both points are whole, since a point refers to
// nothing of its parent's document, and their times say which is the newer.
//
// The error wraps ErrLocked.
func (w *Writer) rival(ctx context.Context) error {
	if w.locked {
		return nil
	}
	names, err := w.repo.Points(ctx, w.vm)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n.Time.After(w.newest) {
			return fmt.Errorf("%w: another backup of it has made %s meanwhile; back up again", ErrLocked, n)
		}
	}
	return nil
}
