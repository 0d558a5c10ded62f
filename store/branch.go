package store

import (
	"context"
	"errors"
	"fmt"
)

// BeginFrom is as Begin, but the new point continues from, which must be one of the VM's, whether it is the
// newest or not. The error wraps ErrNotFound if it is gone.
func (r *Repo) BeginFrom(ctx context.Context, from PointName) (*Writer, error) {
	return r.beginAt(ctx, from.VM, func(w *Writer, ctx context.Context) error {
		names, err := r.Points(ctx, from.VM)
		if err != nil {
			return err
		}
		if len(names) == 0 {
			return fmt.Errorf("%s: %w", from, ErrNotFound)
		}
		w.newest = names[len(names)-1].Time
		if w.parent, err = r.Point(ctx, from); errors.Is(err, ErrNotFound) {
			return fmt.Errorf("%s: %w: the point that it was made from is forgotten", from, ErrNotFound)
		}
		return err
	})
}
