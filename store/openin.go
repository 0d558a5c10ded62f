package store

import (
	"context"

	"github.com/tidemark/tidemark/store/blob"
)

// OpenIn opens the repository whose objects lie in b, which the Repo then owns: for who
// puts something between a repository and its storage. location is what
// [Repo.Location] returns. Errors are those of [Open].
func OpenIn(ctx context.Context, b blob.Store, location string, opts ...Option) (*Repo, error) {
	return openOn(ctx, b, location, opts...)
}
