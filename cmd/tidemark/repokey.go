package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/store"
)

func newRepo(g *globals) *cobra.Command {
	c := &cobra.Command{
		Use:   "repo",
		Short: "Manage a repository's keys",
		Example: `  tidemark repo key list -r /srv/backup
  tidemark repo key add --writer --new-key-file web1.key -r /srv/backup`,
	}
	key := &cobra.Command{
		Use:   "key",
		Short: "List, add, remove, rotate and export the keys of an encrypted repository",
		Long: `The keys of an encrypted repository. A full key reads, writes and changes the keys. A
writer's key makes backups and reads no content: what a source host needs, and no more.`,
		Example: `  tidemark repo key add --writer --name web1 --new-key-file web1.key -r /srv/backup
  tidemark repo key remove 4f1c -r /srv/backup && tidemark repo key rotate -r /srv/backup
  tidemark repo key export /media/usb/backup.key -r /srv/backup`,
	}
	key.AddCommand(newKeyList(g), newKeyAdd(g), newKeyRemove(g), newKeyRotate(g), newKeyExport(g), newKeyGenerate(g))
	c.AddCommand(key)
	return c
}

func newKeyList(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "list -r REPO",
		Short:   "List the keys that open the repository",
		Example: "  tidemark repo key list -r /srv/backup",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			return g.withRepo(c, func(ctx context.Context, r *store.Repo) error {
				l, err := r.Keys(ctx)
				if err != nil {
					return err
				}
				if g.json {
					return printJSON(c.OutOrStdout(), l)
				}
				t := newTable(c.OutOrStdout(), "KEY", "ROLE", "KIND", "CREATED", "NAME", "")
				for _, k := range l.Keys {
					own := ""
					if k.Own {
						own = "(used now)"
					}
					t.row(k.ID, string(k.Role), k.Kind, clock(k.Created), k.Name, own)
				}
				if err := t.flush(); err != nil {
					return err
				}
				if !g.quiet {
					_, _ = fmt.Fprintf(c.OutOrStdout(), "generation %d, since %s\n", l.Generation, clock(l.Rotated))
				}
				for _, o := range l.Old {
					fmt.Fprintf(os.Stderr, "tidemark: %s is an old list of keys, which opens the repository for keys that were removed: delete it\n", o)
				}
				for _, o := range l.Unsigned {
					fmt.Fprintf(os.Stderr, "tidemark: %s is damaged, or somebody else's: delete it\n", o)
				}
				return nil
			})
		},
	}
}

func newKeyAdd(g *globals) *cobra.Command {
	var o struct{ name, newFile, public, passphrase string }
	var writer bool
	c := &cobra.Command{
		Use:   "add [--writer] [--new-key-file FILE | --public-key FILE | --new-passphrase-file FILE] -r REPO",
		Short: "Add a key: a passphrase, or a key file",
		Long: `Add a key: a passphrase, asked for on the terminal, or a key file. It needs a full key.

--new-key-file makes a key file, to be moved to the host that will use it. With --public-key
the secret never leaves that host: make it there with "tidemark repo key generate", bring
the file that ends in .pub here, and add the line that is printed here to the key
file there. That line says by whom the repository's keys must be signed.`,
		Example: `  tidemark repo key add -r /srv/backup
  tidemark repo key add --writer --name web1 --new-key-file web1.key -r /srv/backup
  tidemark repo key add --writer --name web2 --public-key web2.key.pub -r /srv/backup`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			return g.withRepo(c, func(ctx context.Context, r *store.Repo) error {
				n := store.NewKey{Role: store.FullKey, Name: o.name}
				if writer {
					n.Role = store.WriterKey
				}
				done := func(k store.KeyInfo, trust string) error {
					if g.json {
						return printJSON(c.OutOrStdout(), struct {
							store.KeyInfo
							Trust string `json:"trust"`
						}{k, trust})
					}
					if err := g.say(c, nil, "key %s added", k.ID); err != nil || o.public == "" {
						return err
					}
					_, err := fmt.Fprintf(c.OutOrStdout(), "add this line to the key file:\n%s\n", trust)
					return err
				}
				if o.newFile == "" {
					var err error
					if o.public != "" {
						n.Public, err = readPublicKey(o.public)
					} else {
						n.Passphrase, err = newPassphrase(o.passphrase)
					}
					if err != nil {
						return err
					}
					k, trust, err := r.AddKey(ctx, n)
					if err != nil {
						return err
					}
					return done(k, trust)
				}
				var k store.KeyInfo
				var trust string
				err := writeNew(o.newFile, func() ([]byte, error) {
					f, err := store.NewKeyFile()
					if err != nil {
						return nil, err
					}
					if n.Public, err = store.ParsePublicKey(f.Public()); err != nil {
						return nil, err
					}
					if k, trust, err = r.AddKey(ctx, n); err != nil {
						return nil, err
					}
					return encodeTrusting(f, r)
				})
				if err != nil {
					return err
				}
				return done(k, trust)
			})
		},
	}
	f := c.Flags()
	f.BoolVar(&writer, "writer", false, "a key that makes backups and reads no content")
	f.StringVar(&o.name, "name", "", "what you call the key; holders of full keys see it")
	f.StringVar(&o.newFile, "new-key-file", "", "make this key file")
	f.StringVar(&o.public, "public-key", "", "the public half of a key file")
	f.StringVar(&o.passphrase, "new-passphrase-file", "", "file whose first line is the new passphrase")
	c.MarkFlagsMutuallyExclusive("new-key-file", "public-key", "new-passphrase-file")
	return c
}

// encodeTrusting returns the text of a key file that trusts r.
func encodeTrusting(f *store.KeyFile, r *store.Repo) ([]byte, error) {
	if err := r.Trust(f); err != nil {
		return nil, err
	}
	return f.Encode()
}

// newPassphrase reads a new passphrase from a file, or from the terminal.
func newPassphrase(file string) (store.Passphrase, error) {
	if file != "" {
		return readPassphrase(file)
	}
	return askTwice("new passphrase: ")
}

func readPublicKey(name string) (store.PublicKey, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	k, err := store.ParsePublicKey(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return k, nil
}

func newKeyRemove(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "remove KEY -r REPO",
		Short: "Remove a key",
		Long: `Remove a key, given by the beginning of its ID. The last full key can't be removed.

Who had it may have kept a copy of what it opened. To keep what is written from now on from
it, rotate the keys afterwards; to keep what is there from it, make another
repository.`,
		Example: "  tidemark repo key remove 4f1c -r /srv/backup && tidemark repo key rotate -r /srv/backup",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, a []string) error {
			return g.withRepo(c, func(ctx context.Context, r *store.Repo) error {
				if err := r.RemoveKey(ctx, a[0]); err != nil {
					return err
				}
				return g.say(c, map[string]string{"removed": a[0]}, "key %s removed; \"tidemark repo key rotate\" keeps what comes from whoever had it", a[0])
			})
		},
	}
}

func newKeyRotate(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "rotate -r REPO",
		Short: "Use new keys for what is written from now on",
		Long: `Use new keys for what is written from now on. What is there stays as it is, and all
keys of the repository go on opening all of it. The key of content identities and hidden names stays:
with another one nothing would be found to be stored already. Exported keys open
what was written before: export again.`,
		Example: "  tidemark repo key rotate -r /srv/backup",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			return g.withRepo(c, func(ctx context.Context, r *store.Repo) error {
				n, err := r.RotateKeys(ctx)
				if err != nil {
					return err
				}
				return g.say(c, map[string]uint32{"generation": n}, "generation %d", n)
			})
		},
	}
}

func newKeyExport(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "export FILE -r REPO",
		Short: "Write all keys to a file, to be kept apart from the repository",
		Long: `Write all keys to a file that opens the repository without a passphrase (--key-file), even if its
own folder of keys is lost. Keep it offline: it is worth all content. Export again after
each rotation.`,
		Example: "  tidemark repo key export /media/usb/backup.key -r /srv/backup",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, a []string) error {
			return g.withRepo(c, func(ctx context.Context, r *store.Repo) error {
				err := writeNew(a[0], func() ([]byte, error) {
					f, err := r.ExportKeys(ctx)
					if err != nil {
						return nil, err
					}
					return f.Encode()
				})
				if err != nil {
					return err
				}
				return g.say(c, map[string]string{"file": a[0]}, "keys written to %s", a[0])
			})
		},
	}
}

func newKeyGenerate(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "generate FILE",
		Short:   "Make a key file whose secret stays on this host, and FILE.pub for \"repo key add\"",
		Example: "  tidemark repo key generate /etc/tidemark/web2.key",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, a []string) error {
			k, err := store.NewKeyFile()
			if err != nil {
				return err
			}
			public := a[0] + ".pub"
			err = writeNew(a[0], func() ([]byte, error) {
				if err := writeNew(public, func() ([]byte, error) { return k.Public(), nil }); err != nil {
					return nil, err
				}
				return k.Encode()
			})
			if err != nil {
				return err
			}
			return g.say(c, map[string]string{"file": a[0], "public": public}, "%s made; add its public half where you have a full key:\n  tidemark repo key add --writer --public-key %s", a[0], public)
		},
	}
}
