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
		Use:   "init -r REPO",
		Short: "Make a repository",
		Long: `Make a repository: in a directory, which is made if it is missing, or in S3-compatible
storage:

  s3:BUCKET/PREFIX                     AWS, or what AWS_ENDPOINT_URL names
  s3:https://HOST[:PORT]/BUCKET/PREFIX any other server

The bucket must exist; the prefix may be left out. Credentials and region are those of
the AWS tools: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION,
AWS_CA_BUNDLE, ~/.aws. Options follow a question mark: region=R, profile=P,
ca-file=PEM, style=path|virtual (how requests name the bucket).

The storage must heed If-None-Match on writes; init finds out. A key that may list,
read and create objects is enough for backups: they delete and replace nothing.`,
		Example: `  tidemark init -r /srv/backup
  tidemark init -r s3:my-bucket/tidemark
  tidemark init -r 's3:https://minio.example.com:9000/backup/vms?ca-file=/etc/ssl/minio.pem'`,
		Args: args(0, 0),
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
