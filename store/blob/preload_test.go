package blob_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

func TestPreload(t *testing.T) {
	d := newDir(t)
	if err := d.Put(t.Context(), "a/b", bytes.NewReader(make([]byte, 5000)), 5000); err != nil {
		t.Fatal(err)
	}
	for _, s := range []blob.Store{d, plain{d}} {
		if err := blob.Preload(t.Context(), s, "a/b", 4096, 1<<20); err != nil {
			t.Errorf("%T: %v", s, err)
		}
	}
	if err := blob.Preload(t.Context(), d, "a/c", 0, 1); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("what is not there: %v", err)
	}
	if err := blob.Preload(t.Context(), plain{d}, "a/c", 0, 1); err != nil {
		t.Errorf("where nothing can be preloaded: %v", err)
	}
}
