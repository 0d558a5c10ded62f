package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/tidemark/tidemark/store/blob"
)

// A sealed document, see docs/format.md: header, one AES-256-GCM message.
const (
	docMagic     = "TIDEDOCS"
	docVersion   = 1
	docHeaderLen = 48
)

// padded returns the length to which n bytes are filled up, so that the size of an object
// says little of what is in it: Padmé (Nikitin et al., PETS 2019, section 4), in steps of
// 256 bytes at least and maxStep at most.
func padded(n, maxStep int) int {
	e := bits.Len(uint(n)) - 1
	s := bits.Len(uint(e))
	step := min(max(1<<max(e-s, 0), 256), maxStep)
	return (n + step - 1) / step * step
}

// maxPadStep bounds what padding costs, in bytes. So the index of a full pack with grains of 64 KiB and
// its padding are one read of the pack's end.
const maxPadStep = 32 << 10

// sealDoc seals a document for the object name.
func (k *keyring) sealDoc(name string, doc []byte) []byte {
	g := k.newest()
	salt := randomKey()
	b := make([]byte, docHeaderLen, docHeaderLen+padded(4+len(doc)+docHeaderLen+sealLen, 1<<20))
	copy(b, docMagic)
	b[8] = docVersion
	binary.LittleEndian.PutUint32(b[12:], g.number)
	copy(b[16:], salt[:])
	plain := make([]byte, padded(docHeaderLen+4+len(doc)+sealLen, 1<<20)-docHeaderLen-sealLen)
	binary.LittleEndian.PutUint32(plain, uint32(len(doc)))
	copy(plain[4:], doc)
	return g.docKey(salt[:]).seal(b, plain, k.docAAD(b, name))
}

func (g *keySet) docKey(salt []byte) onceKey { return derive(deriveDocument, g.meta[:], salt) }

func (k *keyring) docAAD(header []byte, name string) []byte {
	return append(append(bytes.Clone(header[:docHeaderLen]), k.repo[:]...), name...)
}

// openDoc returns the document of the object name.
func (k *keyring) openDoc(ctx context.Context, b blob.Store, name string, sealed []byte) ([]byte, error) {
	if len(sealed) < docHeaderLen+sealLen+4 || string(sealed[:8]) != docMagic {
		return nil, &CorruptError{name, "not a sealed document"}
	}
	header := sealed[:docHeaderLen]
	n := binary.LittleEndian.Uint32(header[12:])
	g, err := k.set(ctx, b, n)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if g == nil {
		return nil, k.unknownSet(name, n)
	}
	plain, err := g.docKey(header[16:48]).open(nil, sealed[docHeaderLen:], k.docAAD(header, name))
	if err != nil {
		return nil, &CorruptError{name, "it was not sealed under this name in this repository, or is damaged"}
	}
	if header[8] != docVersion {
		return nil, fmt.Errorf("%s: %w: sealed document version %d", name, ErrVersion, header[8])
	}
	doc, err := unpad(plain)
	if err != nil {
		return nil, &CorruptError{name, err.Error()}
	}
	return doc, nil
}

var errPadding = errors.New("bad length or padding")

// unpad returns what is in a length of four bytes, so many bytes, and zeroes.
func unpad(p []byte) ([]byte, error) {
	if len(p) < 4 {
		return nil, errPadding
	}
	n, p := binary.LittleEndian.Uint32(p), p[4:]
	if int64(n) > int64(len(p)) || len(bytes.Trim(p[n:], "\x00")) != 0 {
		return nil, errPadding
	}
	return p[:n], nil
}

// putDoc creates the object name from a small document, sealed if the repository is encrypted.
func (r *reader) putDoc(ctx context.Context, name string, doc []byte) error {
	if r.keys != nil {
		doc = r.keys.sealDoc(name, doc)
	}
	return r.blobs.Put(ctx, name, bytes.NewReader(doc), int64(len(doc)))
}

// getDoc reads what putDoc put: at most limit bytes.
func (r *reader) getDoc(ctx context.Context, name string, limit int64) ([]byte, error) {
	if r.keys == nil {
		return readSmall(ctx, r.blobs, name, limit)
	}
	p, err := readSmall(ctx, r.blobs, name, limit+limit/8+4096)
	if err != nil {
		return nil, err
	}
	return r.keys.openDoc(ctx, r.blobs, name, p)
}

// readSmall reads a whole object of at most limit bytes.
func readSmall(ctx context.Context, b blob.Store, name string, limit int64) (_ []byte, err error) {
	r, err := b.Get(ctx, name, 0, limit+1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	p, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if int64(len(p)) > limit {
		return nil, &CorruptError{name, fmt.Sprintf("longer than %d bytes", limit)}
	}
	return p, nil
}
