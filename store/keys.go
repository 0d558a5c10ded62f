package store

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Encrypted tells whether the repository is encrypted.
func (r *Repo) Encrypted() bool { return r.keys != nil }

// readable tells whether content can be read.
func (r *reader) readable() bool { return r.keys == nil || r.keys.full() }

// CanRead returns nil if content can be read, and an error that wraps ErrWriterKey if the key
// that opened the repository does not allow it.
func (r *Repo) CanRead() error {
	if r.readable() {
		return nil
	}
	return fmt.Errorf("%s: %w", r.location, ErrWriterKey)
}

// KeyInfo describes one key of a repository.
type KeyInfo struct {
	ID      string    `json:"id"`   // 16 hex digits
	Kind    string    `json:"kind"` // "passphrase" or "file"
	Role    Role      `json:"role"`
	Created time.Time `json:"created"`
	Name    string    `json:"name,omitempty"` // known with a full key only
	Own     bool      `json:"own"`            // it opened this Repo
}

// KeyList is what a repository's keys are.
type KeyList struct {
	Keys       []KeyInfo `json:"keys"`
	Generation uint32    `json:"generation"` // of the keys for what is written now; 1 before the first rotation
	Rotated    time.Time `json:"rotated"`    // when that generation was made
	// Unsigned are objects below keys/ that are damaged or not this repository's, and old
	// documents, which open the repository for keys that were removed. They should be deleted.
	Unsigned []string `json:"unsigned,omitempty"`
	Old      []string `json:"old,omitempty"`
}

// NewKey says which key is added: a passphrase, or a key of which the public half is given.
type NewKey struct {
	Role       Role
	Name       string     // for people, up to 64 bytes; sealed
	Passphrase Passphrase // nil if Public is given
	Public     PublicKey
}

var errNoKeys = fmt.Errorf("%w: the repository is not encrypted: it has no keys (a repository is encrypted when it is made, or never)", ErrInvalid)

// Keys lists the keys. It needs any key of the repository.
func (r *Repo) Keys(ctx context.Context) (KeyList, error) {
	if r.keys == nil {
		return KeyList{}, errNoKeys
	}
	if err := r.keys.refresh(ctx, r.blobs); err != nil {
		return KeyList{}, err
	}
	s := r.keys.state.Load()
	last := s.ring.Generations[len(s.ring.Generations)-1]
	l := KeyList{Generation: last.Number, Rotated: last.Created}
	docs, err := listKeyDocs(ctx, r.blobs)
	if err != nil {
		return l, err
	}
	var cur *signedDoc
	for _, o := range docs {
		d, err := readKeyDoc(ctx, r.blobs, o, r.keys.repo)
		switch {
		case err != nil && !errors.Is(err, ErrCorrupt):
			return l, err
		case err != nil || !r.keys.signed(d):
			l.Unsigned = append(l.Unsigned, o.name)
		case cur == nil:
			cur = d
		default:
			l.Old = append(l.Old, o.name)
		}
	}
	if cur == nil {
		return l, nil
	}
	for i := range cur.Slots {
		k := r.keys.info(&cur.Slots[i])
		k.Name = s.ring.Names[k.ID]
		l.Keys = append(l.Keys, k)
	}
	return l, nil
}

// anchor is by whom documents of keys must be signed.
func (k *keyring) anchor() (key32, bool) {
	switch g := k.state.Load().ring; {
	case k.opener != nil:
		return k.opener.anchor, true
	case g.Signing != nil:
		return g.anchor(), true
	}
	return key32{}, false
}

func (k *keyring) signed(d *signedDoc) bool {
	anchor, ok := k.anchor()
	return ok && d.signedBy(anchor)
}

func (k *keyring) info(s *slot) KeyInfo {
	return KeyInfo{
		ID: s.ID, Kind: s.Kind, Role: s.Role, Created: s.Created,
		Own: k.opener != nil && bytes.Equal(s.Public, k.opener.private.PublicKey().Bytes()),
	}
}

// AddKey adds a key. It needs a full key, as all changes of keys do. The trust
// line is for the file of the new key, see [TrustLine].
func (r *Repo) AddKey(ctx context.Context, n NewKey) (_ KeyInfo, trust string, err error) {
	if err := n.check(); err != nil {
		return KeyInfo{}, "", err
	}
	var added slot
	err = r.changeKeys(ctx, func(g *ring, d *keyDoc) error {
		if n.Public != nil && slices.ContainsFunc(d.Slots, func(s slot) bool { return bytes.Equal(s.Public, n.Public) }) {
			return fmt.Errorf("the key %w in this repository", ErrExists)
		}
		var err error
		added, _, err = n.slot(r.repo, g.anchor())
		if err != nil {
			return err
		}
		if n.Name != "" {
			g.Names[added.ID] = n.Name
		}
		d.Slots = append(d.Slots, added)
		return nil
	})
	if err != nil {
		return KeyInfo{}, "", fmt.Errorf("add a key: %w", err)
	}
	i := r.keys.info(&added)
	i.Name = n.Name
	return i, TrustLine(r.repo, r.keys.state.Load().ring.anchor()), nil
}

func (n *NewKey) check() error {
	switch {
	case n.Role != FullKey && n.Role != WriterKey:
		return fmt.Errorf("%w: role %q of a key", ErrInvalid, n.Role)
	case len(n.Name) > 64:
		return fmt.Errorf("%w: name of a key with more than 64 bytes", ErrInvalid)
	case (n.Passphrase == nil) == (n.Public == nil):
		return fmt.Errorf("%w: a key is either a passphrase or a public key", ErrInvalid)
	}
	return nil
}

func (n *NewKey) slot(repo [16]byte, anchor key32) (s slot, o *opener, err error) {
	if n.Public == nil {
		s, o, err = n.Passphrase.newSlot(n.Role, repo, anchor)
	} else {
		public, err := kem().NewPublicKey(n.Public)
		if err != nil {
			return slot{}, nil, fmt.Errorf("%w: public key: %w", ErrInvalid, err)
		}
		s = fileSlot(n.Role, public)
	}
	s.Created = time.Now().UTC().Truncate(time.Second)
	return s, o, err
}

// RemoveKey removes the key whose ID begins so. Who had it can still open copies of what it could
// open until now, and has the keys of what was written until now: [Repo.RotateKeys] changes them for
// what comes. The last full key stays.
func (r *Repo) RemoveKey(ctx context.Context, id string) error {
	err := r.changeKeys(ctx, func(g *ring, d *keyDoc) error {
		var fits []int
		full := 0
		for i := range d.Slots {
			if id != "" && len(id) <= 16 && d.Slots[i].ID[:len(id)] == id {
				fits = append(fits, i)
			}
			if d.Slots[i].Role == FullKey {
				full++
			}
		}
		switch {
		case len(fits) == 0:
			return fmt.Errorf("%w: no key with such an ID", ErrNotFound)
		case len(fits) > 1:
			return fmt.Errorf("%w: it fits %d keys", ErrAmbiguous, len(fits))
		case d.Slots[fits[0]].Role == FullKey && full == 1:
			return fmt.Errorf("%w: the last full key: nobody could read the repository any more", ErrInvalid)
		}
		delete(g.Names, d.Slots[fits[0]].ID)
		d.Slots = slices.Delete(d.Slots, fits[0], fits[0]+1)
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove key %s: %w", id, err)
	}
	return nil
}

// RotateKeys makes new keys for what is written from now on, and returns their generation. What is there
// stays as it is, and the old keys stay for it. The key of identities stays too:
// with another one nothing would be found to be in the repository already.
func (r *Repo) RotateKeys(ctx context.Context) (uint32, error) {
	var n uint32
	err := r.changeKeys(ctx, func(g *ring, _ *keyDoc) error {
		n = g.Generations[len(g.Generations)-1].Number + 1
		next, err := newGeneration(n)
		g.Generations = append(g.Generations, next)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("rotate keys: %w", err)
	}
	return n, nil
}

// changeKeys puts a keys document with what change made of a copy of the newest one and of the ring,
// and deletes the documents before it. That the new object is there is the change. What an interrupted one
// left is deleted first, whatever becomes of this one.
func (r *Repo) changeKeys(ctx context.Context, change func(*ring, *keyDoc) error) error {
	k := r.keys
	if k == nil {
		return errNoKeys
	}
	if err := k.refresh(ctx, r.blobs); err != nil {
		return err
	}
	s := k.state.Load()
	if s.ring.Signing == nil {
		return fmt.Errorf("%w: keys are changed with a full key", ErrWriterKey)
	}
	docs, err := listKeyDocs(ctx, r.blobs)
	if err != nil {
		return err
	}
	d := keyDoc{}
	old, err := (&opener{anchor: s.ring.anchor()}).newest(ctx, r.blobs, docs, k.repo)
	switch {
	case err == nil:
		d = old.keyDoc
		if d.Generation > s.newest.number {
			return fmt.Errorf("%w: the exported keys are older than the last rotation", ErrKey)
		}
		// What a change left that was interrupted: made again, it may find nothing to do.
		stale := slices.DeleteFunc(slices.Clone(docs), func(o listedDoc) bool { return o.number >= d.Number })
		if err := r.deleteKeyDocs(ctx, stale); err != nil {
			return err
		}
	case k.opener != nil || !errors.Is(err, ErrCorrupt):
		return err
	}
	// Else all documents are lost, and the exported keys begin anew.
	d.Version, d.Repository, d.Created = keyDocVersion, hex.EncodeToString(k.repo[:]), time.Now().UTC().Truncate(time.Second)
	d.Number, d.Anchor, d.Slots = 1, s.ring.anchor(), slices.Clone(d.Slots)
	if len(docs) > 0 {
		d.Number = docs[0].number + 1
	}
	g := *s.ring
	g.Generations, g.Names = slices.Clone(g.Generations), maps.Clone(g.Names)
	if err := change(&g, &d); err != nil {
		return err
	}
	d.Generation = g.Generations[len(g.Generations)-1].Number
	if err := r.putKeys(ctx, &g, &d); err != nil {
		return err
	}
	next, err := newRingState(&g, d.Number)
	if err != nil {
		return err
	}
	k.state.Store(next)
	return r.deleteKeyDocs(ctx, docs)
}

// putKeys seals g to all slots of d and puts that.
func (r *reader) putKeys(ctx context.Context, g *ring, d *keyDoc) error {
	for i := range d.Slots {
		if err := d.Slots[i].seal(g, d, r.repo); err != nil {
			return err
		}
	}
	if err := d.check(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	doc, err := d.encode(g.signer())
	if err != nil {
		return err
	}
	err = r.blobs.Put(ctx, keyDocName(d.Number), bytes.NewReader(doc), int64(len(doc)))
	if errors.Is(err, ErrExists) {
		return fmt.Errorf("somebody else changed the keys just now, nothing was changed: %w", err)
	}
	return err
}

func (r *reader) deleteKeyDocs(ctx context.Context, docs []listedDoc) error {
	for _, o := range docs {
		if err := r.blobs.Delete(ctx, o.name); err != nil && !errors.Is(err, ErrNotFound) {
			return fmt.Errorf("the keys were changed, but their document of before is there still, and opens the repository for keys that were removed; delete it: %s: %w", o.name, err)
		}
	}
	return nil
}

// ExportKeys returns all keys as a file that opens the repository even if keys/ is lost, until the next
// rotation for what comes after. It needs a full key; the file is as secret as all content.
func (r *Repo) ExportKeys(ctx context.Context) (*KeyFile, error) {
	if r.keys == nil {
		return nil, errNoKeys
	}
	if err := r.keys.refresh(ctx, r.blobs); err != nil {
		return nil, err
	}
	g := r.keys.state.Load().ring
	if g.Signing == nil {
		return nil, fmt.Errorf("export keys: %w", ErrWriterKey)
	}
	return &KeyFile{trust: map[[16]byte]key32{r.repo: g.anchor()}, rings: map[[16]byte]*ring{r.repo: g}}, nil
}

// Trust adds the repository to those whose keys k opens, so that it can be written with [KeyFile.Encode].
// It needs a full key.
func (r *Repo) Trust(k *KeyFile) error {
	if r.keys == nil {
		return errNoKeys
	}
	anchor, ok := r.keys.anchor()
	if !ok {
		return fmt.Errorf("trust: %w", ErrWriterKey)
	}
	k.trust[r.repo] = anchor
	return nil
}
