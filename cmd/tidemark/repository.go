package main

import (
	"context"
	"errors"
	"io"
	"slices"

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
	return g.openAt(ctx, where)
}

// withRepo opens the repository for one command.
func (g *globals) withRepo(c *cobra.Command, f func(context.Context, *store.Repo) error) (err error) {
	r, err := g.open(c.Context())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return f(c.Context(), r)
}

// cacheBytes bounds the decoded grains that a reading command keeps.
const cacheBytes = 256 << 20

func (g *globals) catalog(ctx context.Context) (*restore.Catalog, *store.Repo, error) {
	r, err := g.open(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := r.CanRead(); err != nil {
		return nil, nil, errors.Join(err, r.Close())
	}
	return restore.NewCatalog(r, restore.NewCache(cacheBytes)), r, nil
}

// bootable opens the repository, which the caller closes, and finds a point to run or restore a machine
// from. What is known to be lost of it is told.
func (g *globals) bootable(c *cobra.Command, ref string) (*restore.Catalog, *store.Repo, *restore.PointDetails, error) {
	cat, repo, err := g.catalog(c.Context())
	if err != nil {
		return nil, nil, nil, err
	}
	p, err := cat.FindBootable(c.Context(), ref)
	if err != nil {
		return nil, nil, nil, errors.Join(err, repo.Close())
	}
	warnDamaged(c, p.VM+"@"+p.ID, p.Damage)
	return cat, repo, p, nil
}

// closers are closed as one, the last one first.
type closers []io.Closer

// Close implements io.Closer.
func (all closers) Close() (err error) {
	for _, c := range slices.Backward(all) {
		err = errors.Join(err, c.Close())
	}
	return err
}

func newInit(g *globals) *cobra.Command {
	var encrypt bool
	var keyFile string
	c := &cobra.Command{
		Use:   "init [--encrypt [--new-key-file FILE]] -r REPO",
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
read and create objects is enough for backups: they delete and replace nothing.

With --encrypt nobody reads or changes what is in it without a key; the
first key is a passphrase ($TIDEMARK_PASSPHRASE, --passphrase-file, or asked for on the
terminal), or the file that --new-key-file makes. A repository is encrypted from
the beginning or never. If all its keys are lost, so is all content: "tidemark repo key export"
makes a copy of them.`,
		Example: `  tidemark init -r /srv/backup
  tidemark init --encrypt -r /srv/backup
  tidemark init -r s3:my-bucket/tidemark
  tidemark init -r 's3:https://minio.example.com:9000/backup/vms?ca-file=/etc/ssl/minio.pem'`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			where, err := g.location()
			if err != nil {
				return err
			}
			var r *store.Repo
			switch {
			case g.encrypted:
				err = usageError{errors.New("--encrypted is for a repository that is there: say --encrypt")}
			case keyFile != "":
				err = writeNew(keyFile, func() (b []byte, err error) {
					r, b, err = initWithKeyFile(c.Context(), where)
					return b, err
				})
			case encrypt:
				r, err = g.initWithPassphrase(c.Context(), where)
			default:
				var key store.Key
				if key, err = g.key(); err == nil && key != nil {
					err = usageError{errors.New("a key was given: say --encrypt, or give none")}
				}
				if err == nil {
					r, err = store.Init(c.Context(), where)
				}
			}
			if r != nil {
				defer func() { err = errors.Join(err, r.Close()) }()
			}
			if err != nil {
				return err
			}
			how := ""
			if r.Encrypted() {
				how = ", encrypted"
			}
			return g.say(c, map[string]any{"repository": r.Location(), "id": r.ID(), "encrypted": r.Encrypted()}, "repository %s made at %s%s", r.ID(), r.Location(), how)
		},
	}
	c.Flags().BoolVar(&encrypt, "encrypt", false, "encrypt it")
	c.Flags().StringVar(&keyFile, "new-key-file", "", "encrypt it, with a key file that is made here instead of a passphrase")
	return c
}

func (g *globals) initWithPassphrase(ctx context.Context, where string) (*store.Repo, error) {
	key, err := g.key()
	if err != nil {
		return nil, err
	}
	p, ok := key.(store.Passphrase)
	switch {
	case key != nil && !ok:
		return nil, usageError{errors.New("a new repository begins with a passphrase or with --new-key-file; `tidemark repo key add --public-key` adds a key file that is there")}
	case key == nil:
		if p, err = newPassphrase(""); err != nil {
			return nil, err
		}
	}
	r, err := store.Init(ctx, where, store.Encrypt(store.NewKey{Role: store.FullKey, Passphrase: p}))
	if err == nil && key == nil {
		remember(where)
	}
	return r, err
}

// initWithKeyFile also returns the text of the file.
func initWithKeyFile(ctx context.Context, where string) (*store.Repo, []byte, error) {
	f, err := store.NewKeyFile()
	if err != nil {
		return nil, nil, err
	}
	public, err := store.ParsePublicKey(f.Public())
	if err != nil {
		return nil, nil, err
	}
	r, err := store.Init(ctx, where, store.Encrypt(store.NewKey{Role: store.FullKey, Public: public}))
	if err != nil {
		return nil, nil, err
	}
	b, err := encodeTrusting(f, r)
	return r, b, err
}
