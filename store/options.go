package store

import (
	"context"
	"fmt"

	"github.com/tidemark/tidemark/store/blob"
)

// Option changes how a repository is made or opened.
type Option func(*options)

type options struct {
	key Key
	ask func(context.Context) (Key, error)
	new *NewKey // of a new repository

	encrypted bool // it must be
}

// WithKey opens an encrypted repository with k. One that is not encrypted is refused then, with an error
// that wraps ErrNotEncrypted: else whoever can write to the storage could have what comes stored in the clear.
func WithKey(k Key) Option { return func(o *options) { o.key = k } }

// MustBeEncrypted refuses a repository that says that it is not encrypted, as WithKey does. It is for whoever has
// the key asked for.
func MustBeEncrypted() Option { return func(o *options) { o.encrypted = true } }

// AskKey has ask called for a key if the repository is encrypted and none was given. Its errors are
// returned as they are.
func AskKey(ask func(context.Context) (Key, error)) Option { return func(o *options) { o.ask = ask } }

// Encrypt makes an encrypted repository whose first key is k, which has to be a full key. To open it
// in the same step, [Init] needs no [WithKey].
func Encrypt(k NewKey) Option { return func(o *options) { o.new = &k } }

func collect(opts []Option) (o options) {
	for _, f := range opts {
		f(&o)
	}
	return o
}

// open returns the keys of the repository, or nil if it is not encrypted.
func (o *options) open(ctx context.Context, b blob.Store, c config) (*keyring, error) {
	if c.Encryption.Mode == encryptionNone {
		switch {
		case o.key != nil:
			return nil, fmt.Errorf("a key was given, and %w", ErrNotEncrypted)
		case o.encrypted:
			return nil, fmt.Errorf("%w, and it must be", ErrNotEncrypted)
		}
		return nil, nil //nolint:nilnil // no keys
	}
	k := o.key
	if k == nil && o.ask != nil {
		var err error
		if k, err = o.ask(ctx); err != nil {
			return nil, err
		}
	}
	if k == nil {
		return nil, fmt.Errorf("%w: the repository is encrypted", ErrKey)
	}
	g, number, op, err := k.ring(ctx, b, c.id())
	if err != nil {
		return nil, err
	}
	r, err := newKeyring(c.id(), g, number, op)
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	return r, nil
}

// initKeys makes the keys of a new repository and puts them, before its config makes it one.
func (k *NewKey) initKeys(ctx context.Context, b blob.Store, repo [16]byte) (*keyring, error) {
	if err := k.check(); err != nil {
		return nil, err
	}
	if k.Role != FullKey {
		return nil, fmt.Errorf("%w: the first key must be a full one", ErrInvalid)
	}
	g, err := newRing(repo)
	if err != nil {
		return nil, err
	}
	s, o, err := k.slot(repo, g.anchor())
	if err != nil {
		return nil, err
	}
	if k.Name != "" {
		g.Names[s.ID] = k.Name
	}
	d := keyDoc{
		Version: keyDocVersion, Number: 1, Repository: g.Repository, Created: s.Created,
		Generation: 1, Anchor: g.anchor(), Slots: []slot{s},
	}
	if err := (&reader{blobs: b, repo: repo}).putKeys(ctx, g, &d); err != nil {
		return nil, err
	}
	return newKeyring(repo, g, 1, o)
}
