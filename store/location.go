package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/s3"
)

// site is where a repository lies: in a folder, or in a bucket.
type site struct {
	dir string // "" if it is a bucket
	s3  s3.Location
}

// parseLocation tells the kind of a location: "/path" and "dir:/path" are local
// folders, "s3:..." is object storage.
func parseLocation(location string) (site, error) {
	scheme, rest, ok := strings.Cut(location, ":")
	switch {
	case location == "" || ok && rest == "":
		return site{}, fmt.Errorf("%w: empty repository location", ErrInvalid)
	case !ok || strings.Contains(scheme, "/"):
		return site{dir: location}, nil
	case scheme == "dir":
		return site{dir: rest}, nil
	case scheme == "s3":
		l, err := s3.Parse(rest)
		if err != nil {
			return site{}, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		return site{s3: l}, nil
	}
	return site{}, fmt.Errorf("%w: unknown kind %q (a folder of that name: dir:%s)", ErrInvalid, scheme, location)
}

// create opens the place of a new repository. A folder is made, a bucket is not:
// who makes it decides on versions and locks.
func (p site) create(ctx context.Context) (blob.Store, error) {
	if p.dir != "" {
		return orNil(blob.CreateDir(p.dir))
	}
	return orNil(s3.Open(ctx, p.s3, s3.Options{}))
}

func (p site) open(ctx context.Context) (blob.Store, error) {
	if p.dir == "" {
		return orNil(s3.Open(ctx, p.s3, s3.Options{}))
	}
	d, err := blob.OpenDir(p.dir)
	if errors.Is(err, blob.ErrNotFound) {
		return nil, fmt.Errorf("%w: the folder does not exist", ErrNotRepository)
	}
	return orNil(d, err)
}

// orNil keeps a nil pointer from becoming a Store that is not nil.
func orNil[S blob.Store](s S, err error) (blob.Store, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}
