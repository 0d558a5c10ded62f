package store

import (
	"bytes"
	"context"
	"crypto/hpke"
	"encoding/binary"
	"fmt"
)

// What a check saw is the guest's content. So in an encrypted repository it is sealed to the content
// key, as packs of grains are, and then as all documents are. See docs/format.md.
const seenInfo = "tidemark repository v1 seen"

func (r *Repo) putSeen(ctx context.Context, name string, s Seen) error {
	doc, err := encodeDocument(name, "seen", s)
	if err != nil {
		return err
	}
	if r.keys != nil {
		if doc, err = r.keys.newest().sealSeen(r.keys.repo, name, doc); err != nil {
			return err
		}
	}
	return r.putDoc(ctx, name, doc)
}

func (r *Repo) getSeen(ctx context.Context, name string) (s Seen, err error) {
	doc, err := r.getDoc(ctx, name, maxDocument)
	if err != nil {
		return s, err
	}
	if r.keys != nil {
		if doc, err = r.openSeen(ctx, name, doc); err != nil {
			return s, err
		}
	}
	return s, decodeDocument(name, "seen", doc, &s)
}

// sealSeen returns the number of the keys (4 bytes), the encapsulated key, and the sealed document.
func (g *keySet) sealSeen(repo [16]byte, name string, doc []byte) ([]byte, error) {
	enc, to, err := hpke.NewSender(g.public, kdf(), aead(), []byte(seenInfo))
	if err != nil {
		return nil, fmt.Errorf("seal what was seen: %w", err)
	}
	head := binary.LittleEndian.AppendUint32(nil, g.number)
	sealed, err := to.Seal(seenAAD(head, repo, name), doc)
	if err != nil {
		return nil, fmt.Errorf("seal what was seen: %w", err)
	}
	return append(append(head, enc...), sealed...), nil
}

func seenAAD(head []byte, repo [16]byte, name string) []byte {
	return append(append(bytes.Clone(head), repo[:]...), name...)
}

func (r *Repo) openSeen(ctx context.Context, name string, p []byte) ([]byte, error) {
	if len(p) < 4+encapLen+sealLen {
		return nil, &CorruptError{name, "too short"}
	}
	n := binary.LittleEndian.Uint32(p)
	g, err := r.keys.set(ctx, r.blobs, n)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", name, err)
	case g == nil:
		return nil, r.keys.unknownSet(name, n)
	case g.private == nil:
		return nil, fmt.Errorf("%s: %w", name, ErrWriterKey)
	}
	from, err := hpke.NewRecipient(p[4:4+encapLen], g.private, kdf(), aead(), []byte(seenInfo))
	if err != nil {
		return nil, &CorruptError{name, "bad encapsulated key"}
	}
	doc, err := from.Open(seenAAD(p[:4], r.keys.repo, name), p[4+encapLen:])
	if err != nil {
		return nil, &CorruptError{name, "it was not sealed under this name to this repository's content key"}
	}
	return doc, nil
}
