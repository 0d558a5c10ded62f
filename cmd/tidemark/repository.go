package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/store"
)

func (g *globals) location() (string, error) {
	if g.repo == "" {
		return "", usageError{errors.New("no repository: give -r REPO or set TIDEMARK_REPO")}
	}
	return g.repo, nil
}

func (g *globals) open(ctx context.Context) (*store.Repo, error) {
	where, err := g.location()
	if err != nil {
		return nil, err
	}
	return store.Open(ctx, where)
}

// cacheBytes bounds the decoded grains that a reading command keeps.
const cacheBytes = 256 << 20

func (g *globals) catalog(ctx context.Context) (*restore.Catalog, *store.Repo, error) {
	r, err := g.open(ctx)
	if err != nil {
		return nil, nil, err
	}
	return restore.NewCatalog(r, restore.NewCache(cacheBytes)), r, nil
}

func newInit(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "init -r REPO",
		Short:   "Make a repository",
		Example: "  tidemark init -r /srv/backup",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			where, err := g.location()
			if err != nil {
				return err
			}
			r, err := store.Init(c.Context(), where)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, r.Close()) }()
			if g.json {
				return printJSON(c.OutOrStdout(), map[string]string{"repository": r.Location(), "id": r.ID()})
			}
			if !g.quiet {
				_, err = fmt.Fprintf(c.OutOrStdout(), "repository %s made at %s\n", r.ID(), r.Location())
			}
			return err
		},
	}
}
