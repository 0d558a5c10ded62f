package restore

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// ErrOverlayMoved is wrapped when what an overlay holds was brought to a disk of its own: what was written since is
// there alone.
var ErrOverlayMoved = errors.New("overlay was hydrated")

// moved is what is said beside an overlay of where its disk is now.
type moved struct {
	Target string    `json:"target"`
	Time   time.Time `json:"time"`
}

func movedFile(overlay string) string { return overlay + ".hydrated" }

// MarkMoved says durably that the disk of an overlay is at target from now on. The overlay can't be opened, nor
// another one of that name be made, until [UnmarkMoved] or a person removes the file OVERLAY.hydrated.
func MarkMoved(overlay, target string) error {
	fail := func(err error) error { return fmt.Errorf("mark overlay %s as hydrated: %w", overlay, err) }
	b, err := json.Marshal(moved{Target: target, Time: time.Now().UTC()})
	if err != nil {
		return fail(err)
	}
	path := movedFile(overlay)
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".new-*")
	if err != nil {
		return fail(err)
	}
	_, err = f.Write(append(b, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fail(errors.Join(err, os.Remove(f.Name())))
	}
	if err := Publish(f.Name(), path, true); err != nil {
		return fail(err)
	}
	return nil
}

// UnmarkMoved takes MarkMoved back. Taking back what is not marked is no error.
func UnmarkMoved(overlay string) error {
	if err := removeIfThere(movedFile(overlay)); err != nil {
		return err
	}
	return syncDir(filepath.Dir(overlay))
}

// notMoved returns an error that wraps ErrOverlayMoved if the overlay's disk is elsewhere.
func notMoved(overlay string) error {
	b, err := os.ReadFile(movedFile(overlay))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var m moved
	if json.Unmarshal(b, &m) != nil {
		m.Target = "(unreadable)"
	}
	return fmt.Errorf("%s: %w to %s at %s; what the VM wrote since is there. Delete %s to use the overlay as it was then",
		overlay, ErrOverlayMoved, m.Target, m.Time.Local().Format(time.DateTime), movedFile(overlay))
}
