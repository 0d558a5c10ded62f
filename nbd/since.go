package nbd

import (
	"context"
	"fmt"

	"github.com/tidemark/tidemark/restore"
)

// Since is a [History] of one state.
type Since struct {
	Name string
	Disk restore.Disk
}

var _ History = Since{}

// List implements [History].
func (s Since) List(context.Context) ([]string, error) { return []string{s.Name}, nil }

// Open implements [History].
func (s Since) Open(_ context.Context, name string) (restore.Disk, func(), error) {
	if name != s.Name {
		return nil, nil, fmt.Errorf("%w %q", ErrUnknownPast, name)
	}
	return s.Disk, func() {}, nil
}
