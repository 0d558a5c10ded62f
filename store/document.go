package store

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
)

// Documents by which writers, garbage collections and people agree: sessions,
// lists of condemned packs, pins. Each is a line "tidemark-<kind> 1 <hash>" and a JSON
// body; the hash is that of the document with the line cut before it. In an encrypted
// repository they are sealed as points are.

const (
	documentVersion = 1
	maxDocument     = 16 << 20
)

// encodeDocument returns a document that decodeDocument reads.
func encodeDocument(kind string, v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", kind, err)
	}
	body = append(body, '\n')
	doc := fmt.Appendf(nil, "tidemark-%s %d ", kind, documentVersion)
	doc = fmt.Appendf(doc, "%s\n", plainHasher.sum(append(bytes.Clone(doc), body...)))
	if len(doc)+len(body) > maxDocument {
		return nil, fmt.Errorf("%w: %s of %d bytes, the most is %d", ErrInvalid, kind, len(doc)+len(body), maxDocument)
	}
	return append(doc, body...), nil
}

// decodeDocument fills v from the document of the object name. Nothing of v is to be
// used after an error, which wraps ErrCorrupt or ErrVersion.
func decodeDocument(name, kind string, doc []byte, v any) error {
	head, body, ok := bytes.Cut(doc, []byte("\n"))
	words := strings.Split(string(head), " ")
	switch {
	case !ok || len(words) != 3 || words[2] != plainHasher.sum(append([]byte(words[0]+" "+words[1]+" "), body...)).String():
		return &CorruptError{name, "the document does not match its hash"}
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
	doc, err := encodeDocument(kind, v)
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
