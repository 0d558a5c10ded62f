package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// VMs returns the names of all VMs with points, ascending.
func (r *Repo) VMs(ctx context.Context) ([]string, error) {
	dirs, err := r.blobs.ListDirs(ctx, pointPrefix)
	if err != nil {
		return nil, err
	}
	vms := make([]string, 0, len(dirs))
	for _, d := range dirs {
		vm, ok := r.vmOf(d)
		if !ok {
			continue
		}
		// A folder may be left without points: by a backup that was killed, or
		// when the last one was deleted.
		for info, err := range r.blobs.List(ctx, pointPrefix+d+"/") {
			if err != nil {
				return nil, err
			}
			if _, ok := r.parsePointName(info.Name); ok {
				vms = append(vms, vm)
				break
			}
		}
	}
	slices.Sort(vms) // hidden names come in another order
	return vms, nil
}

// Points returns the names of the VM's points, ascending by time. It costs one
// listing; no document is read. Objects with other
// names than a point's are left out. No points is no error.
func (r *Repo) Points(ctx context.Context, vm string) ([]PointName, error) {
	if err := ValidVM(vm); err != nil {
		return nil, err
	}
	var names []PointName
	for info, err := range r.blobs.List(ctx, r.pointFolder(vm)) {
		if err != nil {
			return nil, err
		}
		if n, ok := r.parsePointName(info.Name); ok {
			names = append(names, n)
		}
	}
	return names, nil // the order of names is that of times
}

// Point reads the document of a point and checks it against its hash. The
// error wraps ErrNotFound or ErrCorrupt.
func (r *Repo) Point(ctx context.Context, n PointName) (*Point, error) {
	if ValidVM(n.VM) != nil {
		return nil, fmt.Errorf("%w: point name %s", ErrInvalid, n)
	}
	object := r.pointObject(n)
	if got, ok := r.parsePointName(object); !ok || got.ID != n.ID {
		return nil, fmt.Errorf("%w: point name %s", ErrInvalid, n)
	}
	doc, err := r.getDoc(ctx, object, maxPointLen)
	if err != nil {
		return nil, err
	}
	return decodePoint(doc, object, n, r.ids)
}

// Find returns the point that a user means by
//
//	NAME or NAME@latest    the newest
//	NAME@proven            the newest whose last check says that it boots, see [Check]
//	NAME@ID                the one whose ID begins so
//	NAME@TIME              the newest at or before TIME, which is RFC 3339 or as
//	                       2006-01-02T15-04-05Z; without a fraction it means the
//	                       whole second
//
// The error wraps ErrNotFound, ErrAmbiguous or ErrInvalid.
func (r *Repo) Find(ctx context.Context, ref string) (*Point, error) {
	n, err := r.FindName(ctx, ref)
	if err != nil {
		return nil, err
	}
	return r.Point(ctx, n)
}

// FindName is as Find, but reads no document: so it finds a damaged point too.
func (r *Repo) FindName(ctx context.Context, ref string) (PointName, error) {
	names, which, err := r.candidates(ctx, ref)
	if err != nil {
		return PointName{}, err
	}
	n, err := r.choose(ctx, names, which)
	if err != nil {
		return PointName{}, fmt.Errorf("%s: %w", ref, err)
	}
	return n, nil
}

// choose chooses from names, which are ascending and not empty.
func (r *Repo) choose(ctx context.Context, names []PointName, which string) (PointName, error) {
	if which == provenWord {
		return r.proven(ctx, names)
	}
	return pick(names, which)
}

// candidates returns the points of the VM that ref names, at least one, and which of them it means.
func (r *Repo) candidates(ctx context.Context, ref string) (names []PointName, which string, err error) {
	vm, which, given := strings.Cut(ref, "@")
	if !given {
		which = "latest"
	}
	if names, err = r.Points(ctx, vm); err != nil {
		return nil, "", err
	}
	if len(names) == 0 {
		return nil, "", fmt.Errorf("%s: %w: no points of %s", ref, ErrNotFound, vm)
	}
	return names, which, nil
}

// startsID tells whether which is the start of an ID, and no time.
func startsID(which string) bool { return which != "" && len(which) <= 16 && isHex(which) }

// pick chooses from names, which are ascending and not empty.
func pick(names []PointName, which string) (PointName, error) {
	if which == "latest" {
		return names[len(names)-1], nil
	}
	if startsID(which) {
		var fits []PointName
		for _, n := range names {
			if strings.HasPrefix(n.ID, which) {
				fits = append(fits, n)
			}
		}
		switch len(fits) {
		case 0:
			return PointName{}, fmt.Errorf("%w: no point with such an ID", ErrNotFound)
		case 1:
			return fits[0], nil
		}
		return PointName{}, fmt.Errorf("%w: it fits %d points, such as %s and %s", ErrAmbiguous, len(fits), fits[0].ID, fits[1].ID)
	}
	t, err := parseUserTime(which)
	if err != nil {
		return PointName{}, err
	}
	i, _ := slices.BinarySearchFunc(names, t, func(n PointName, t time.Time) int {
		if n.Time.After(t) {
			return 1
		}
		return -1
	})
	if i == 0 {
		return PointName{}, fmt.Errorf("%w: the oldest point is of %s", ErrNotFound, names[0].Time.Format(time.RFC3339))
	}
	return names[i-1], nil
}

var errUserTime = errors.New("neither latest, nor proven, nor an ID, nor a time as 2006-01-02T15:04:05Z")

func parseUserTime(s string) (time.Time, error) {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15-04-05Z"} {
		t, err := time.Parse(layout, s)
		if err != nil {
			continue
		}
		if !strings.ContainsAny(s, ".,") {
			t = t.Add(time.Second - 1)
		}
		return t.UTC(), nil
	}
	return time.Time{}, fmt.Errorf("%w: %w", ErrInvalid, errUserTime)
}
