package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Documents by which writers, garbage collections and people agree: sessions,
// lists of condemned packs, pins. Each is a line "tidemark-<kind> 1 <hash>" and a JSON
// body, see docs/gc.md. The hash, without a key, is of the object's name, the line up to the hash, and the body.

const (
	documentVersion = 1
	maxDocument     = 16 << 20
)

// encodeDocument returns a document that decodeDocument reads.
func encodeDocument(name, kind string, v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", kind, err)
	}
	body = append(body, '\n')
	doc := fmt.Appendf(nil, "tidemark-%s %d ", kind, documentVersion)
	doc = fmt.Appendf(doc, "%s\n", documentHash(name, doc, body))
	if len(doc)+len(body) > maxDocument {
		return nil, fmt.Errorf("%w: %s of %d bytes, the most is %d", ErrInvalid, kind, len(doc)+len(body), maxDocument)
	}
	return append(doc, body...), nil
}

func documentHash(name string, line, body []byte) Hash {
	return plainHasher.sum(slices.Concat([]byte(name), []byte("\n"), line, body))
}

// decodeDocument fills v from the document of the object name. Nothing of v is to be
// used after an error, which wraps ErrCorrupt or ErrVersion.
func decodeDocument(name, kind string, doc []byte, v any) error {
	head, body, ok := bytes.Cut(doc, []byte("\n"))
	words := strings.Split(string(head), " ")
	switch {
	case !ok || len(words) != 3 || words[2] != documentHash(name, head[:len(head)-len(words[2])], body).String():
		return &CorruptError{name, "it does not match its hash and name"}
	case words[0] != "tidemark-"+kind:
		return &CorruptError{name, "it is the document of something else"}
	case words[1] != fmt.Sprint(documentVersion):
		return fmt.Errorf("%s: %w: %s version %s", name, ErrVersion, kind, words[1])
	}
	if err := json.Unmarshal(body, v); err != nil {
		return &CorruptError{name, err.Error()}
	}
	return nil
}

func (r *Repo) putDocument(ctx context.Context, name, kind string, v any) error {
	doc, err := encodeDocument(name, kind, v)
	if err != nil {
		return err
	}
	return r.putDoc(ctx, name, doc)
}

// document reads the object name. The error wraps ErrNotFound, ErrCorrupt or
// ErrVersion.
func (r *Repo) document(ctx context.Context, name, kind string, v any) error {
	doc, err := r.getDoc(ctx, name, maxDocument)
	if err != nil {
		return err
	}
	return decodeDocument(name, kind, doc, v)
}

// names lists the objects whose names begin with prefix.
func (r *Repo) names(ctx context.Context, prefix string) (names []string, err error) {
	for info, err := range r.blobs.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		names = append(names, info.Name)
	}
	return names, nil
}

// removed deletes objects in this order, or finds them deleted.
func (r *Repo) removed(ctx context.Context, names ...string) error {
	for _, name := range names {
		if err := r.blobs.Delete(ctx, name); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return nil
}

// exists tells whether there is an object of that name.
func (r *Repo) exists(ctx context.Context, name string) (bool, error) {
	_, err := r.blobs.Stat(ctx, name)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}
