package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A pin keeps a point from being forgotten, by policies and by name. Its object is
// pins/<vm>/<time>-<id>, beside the point's.
const pinPrefix = "pins/"

// ErrPinned is wrapped when a point is not forgotten because it is pinned.
var ErrPinned = errors.New("pinned")

// maxNote bounds the note of a pin, in bytes.
const maxNote = 1000

// Pin says who wants a point to be kept.
type Pin struct {
	Note string    `json:"note,omitempty"`
	Time time.Time `json:"time"`
	Host string    `json:"host"`
}

func (r *reader) pinObject(n PointName) string {
	return pinPrefix + strings.TrimPrefix(r.pointObject(n), pointPrefix)
}

// Pin keeps a point until it is unpinned. The error wraps ErrExists if it is pinned already,
// ErrNotFound if there is no such point.
func (r *Repo) Pin(ctx context.Context, n PointName, note string) error {
	if len(note) > maxNote {
		return fmt.Errorf("%w: a note of %d bytes, the most is %d", ErrInvalid, len(note), maxNote)
	}
	doc := Pin{Note: note, Time: time.Now().UTC(), Host: thisProcess().Host}
	if err := r.putDocument(ctx, r.pinObject(n), "pin", doc); err != nil {
		return fmt.Errorf("pin %s: %w", n, err)
	}
	// The pin first: whoever forgets looks for it last.
	there, err := r.exists(ctx, r.pointObject(n))
	if err == nil && !there {
		err = errors.Join(fmt.Errorf("the point: %w", ErrNotFound), r.removed(ctx, r.pinObject(n)))
	}
	if err != nil {
		return fmt.Errorf("pin %s: %w", n, err)
	}
	return nil
}

// Unpin takes a pin away. The error wraps ErrNotFound if there is none.
func (r *Repo) Unpin(ctx context.Context, n PointName) error {
	if err := r.blobs.Delete(ctx, r.pinObject(n)); err != nil {
		return fmt.Errorf("unpin %s: %w", n, err)
	}
	return nil
}

// Pins returns the pins of a VM's points. A damaged pin is a pin whose note is lost.
func (r *Repo) Pins(ctx context.Context, vm string) (map[PointName]Pin, error) {
	if err := ValidVM(vm); err != nil {
		return nil, err
	}
	pins := map[PointName]Pin{}
	for info, err := range r.blobs.List(ctx, pinPrefix+r.folder(vm)+"/") {
		if err != nil {
			return nil, err
		}
		n, ok := r.parsePointName(pointPrefix + strings.TrimPrefix(info.Name, pinPrefix))
		if !ok {
			continue
		}
		var p Pin
		err := r.document(ctx, info.Name, "pin", &p)
		switch {
		case errors.Is(err, ErrNotFound):
			continue // unpinned since
		case errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion):
			p = Pin{Note: "(the pin is damaged)"}
		case err != nil:
			return nil, err
		}
		pins[n] = p
	}
	return pins, nil
}
