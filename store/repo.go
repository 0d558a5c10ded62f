package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

// Repo is an open repository. Safe for concurrent use. Reading needs no lock
// and no daemon; writing one VM at a time does, see [Repo.Begin].
type Repo struct {
	*reader
	location string
	config   config

	// When a pack is full, in bytes; smaller in tests.
	dataPackLen, nodePackLen int
	share                    share // among Writers
}

// Targets for the size of a pack, in bytes: large enough that objects are few,
// small enough that two of them fit into memory. Node packs are smaller since a
// map is 1/1000 of its data.
const (
	dataPackLen = 32 << 20
	nodePackLen = 8 << 20
)

// Init makes a new repository and opens it. A location is a folder, "/path" or
// "dir:/path", which is made if it is missing and must be empty; or a bucket with a prefix,
// "s3:bucket/prefix" or "s3:https://host/bucket/prefix" (see [s3.Parse]): the bucket must exist, nothing must
// lie below the prefix. The error wraps ErrExists if a repository or anything else is there. It is not
// encrypted without the option [Encrypt].
func Init(ctx context.Context, location string, opts ...Option) (*Repo, error) {
	p, err := parseLocation(location)
	if err != nil {
		return nil, fmt.Errorf("init %s: %w", location, err)
	}
	b, err := p.create(ctx)
	if err != nil {
		return nil, fmt.Errorf("init %s: %w", location, err)
	}
	r, err := initOn(ctx, b, location, opts...)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("init %s: %w", location, err), b.Close())
	}
	return r, nil
}

func initOn(ctx context.Context, b blob.Store, location string, opts ...Option) (*Repo, error) {
	o := collect(opts)
	if o.key != nil {
		return nil, fmt.Errorf("%w: a new repository is given its key by Encrypt", ErrInvalid)
	}
	if _, err := readConfig(ctx, b); err == nil {
		return nil, fmt.Errorf("a repository %w", ErrExists)
	}
	if err := clearPlace(ctx, b); err != nil {
		return nil, err
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	mode := encryptionNone
	var keys *keyring
	if o.new != nil {
		mode = encryptionGCM
		var err error
		if keys, err = o.new.initKeys(ctx, b, id); err != nil {
			return nil, err
		}
	}
	doc, err := encodeConfig(config{
		Format: configFormat, Version: configVersion, ID: fmt.Sprintf("%x", id),
		Created: time.Now().UTC(), Hash: "blake3", Encryption: encryption{Mode: mode},
	})
	if err != nil {
		return nil, err
	}
	if err := b.Put(ctx, configName, bytes.NewReader(doc), int64(len(doc))); err != nil {
		return nil, err
	}
	// Once more, the same bytes: that a name which is taken stays as it is must be seen, since
	// not all storage that takes the condition heeds it.
	if err := b.Put(ctx, configName, bytes.NewReader(doc), int64(len(doc))); !errors.Is(err, blob.ErrExists) {
		if err == nil {
			err = errors.New("the storage replaces objects that exist although it was told not to (If-None-Match): no repository can be kept there")
		}
		return nil, err
	}
	cfg, err := readConfig(ctx, b)
	if err != nil {
		return nil, err
	}
	return newRepo(b, location, cfg, keys)
}

// clearPlace makes sure that nothing is there but the keys of an init that was killed before
// it had made a repository: nothing can have been stored with them.
func clearPlace(ctx context.Context, b blob.Store) error {
	var keys []string
	for info, err := range b.List(ctx, "") {
		if err != nil {
			return err
		}
		if !strings.HasPrefix(info.Name, keyPrefix) {
			return fmt.Errorf("the place is not empty: %s %w", info.Name, ErrExists)
		}
		keys = append(keys, info.Name)
	}
	for _, name := range keys {
		if err := b.Delete(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// Open opens a repository. The error wraps ErrNotRepository if there is none,
// ErrVersion if it was made by a newer program, ErrCorrupt if its config is
// damaged, ErrKey if it is encrypted and no fitting key was given, ErrNotEncrypted if it is not
// and one was given or it must be.
func Open(ctx context.Context, location string, opts ...Option) (*Repo, error) {
	p, err := parseLocation(location)
	if err != nil {
		return nil, openError(location, err)
	}
	b, err := p.open(ctx)
	if err != nil {
		return nil, openError(location, err)
	}
	r, err := openOn(ctx, b, location, opts...)
	if err != nil {
		return nil, errors.Join(openError(location, err), b.Close())
	}
	return r, nil
}

func openError(location string, err error) error {
	if errors.Is(err, ErrNotRepository) {
		err = fmt.Errorf("%w (make one with \"tidemark init -r %s\")", err, location)
	}
	return fmt.Errorf("open %s: %w", location, err)
}

// openOn opens the repository in b, which the Repo then owns.
func openOn(ctx context.Context, b blob.Store, location string, opts ...Option) (*Repo, error) {
	cfg, err := readConfig(ctx, b)
	if err != nil {
		return nil, err
	}
	o := collect(opts)
	keys, err := o.open(ctx, b, cfg)
	if err != nil {
		return nil, err
	}
	return newRepo(b, location, cfg, keys)
}

func newRepo(b blob.Store, location string, cfg config, keys *keyring) (*Repo, error) {
	c, err := newCodec()
	if err != nil {
		return nil, err
	}
	rd, err := newReader(b, cfg.id(), c, keys)
	if err != nil {
		c.close()
		return nil, err
	}
	return &Repo{reader: rd, location: location, config: cfg, dataPackLen: dataPackLen, nodePackLen: nodePackLen}, nil
}

// ID returns the repository's random id: 32 hex digits.
func (r *Repo) ID() string { return r.config.ID }

// Location returns what the repository was opened by.
func (r *Repo) Location() string { return r.location }

// Close gives back what r holds. Nothing made from r may be used afterwards.
func (r *Repo) Close() error {
	r.codec.close()
	return r.blobs.Close()
}

// ReadGrain fills dst, whose length is the disk's grain in bytes, with the grain
// at ref. What it returns was checked against ref.Hash; after an error dst holds
// zeroes. A [CorruptError] names the pack and the record.
func (r *Repo) ReadGrain(ctx context.Context, ref Ref, dst []byte) error {
	return r.grain(ctx, ref, dst)
}

// IsGrain tells whether p, a whole grain, is the content at ref. It reads nothing.
func (r *Repo) IsGrain(ref Ref, p []byte) bool {
	if ref.IsZero() {
		return IsZero(p)
	}
	return r.ids.sum(p) == ref.Hash
}
