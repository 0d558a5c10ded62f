package store

import (
	"errors"
	"fmt"
	"strings"

	"github.com/tidemark/tidemark/store/blob"
)

// splitLocation tells the kind of a location from its path: "/path" and
// "dir:/path" are local folders, "s3:..." will be object storage.
func splitLocation(location string) (path string, err error) {
	scheme, rest, ok := strings.Cut(location, ":")
	switch {
	case location == "" || ok && rest == "":
		return "", fmt.Errorf("%w: empty repository location", ErrInvalid)
	case !ok || strings.Contains(scheme, "/"):
		return location, nil
	case scheme == "dir":
		return rest, nil
	case scheme == "s3":
		return "", fmt.Errorf("repository %s: s3 is not supported yet: %w", location, errors.ErrUnsupported)
	}
	return "", fmt.Errorf("%w: repository %s: unknown kind %q (a folder of that name: dir:%s)", ErrInvalid, location, scheme, location)
}

func openBlobs(location string) (blob.Store, error) {
	path, err := splitLocation(location)
	if err != nil {
		return nil, err
	}
	d, err := blob.OpenDir(path)
	if errors.Is(err, blob.ErrNotFound) {
		return nil, fmt.Errorf("%w: the folder does not exist", ErrNotRepository)
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}
