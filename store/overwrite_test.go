package store

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

// heedless replaces what is there, as storage does that takes no notice of If-None-Match.
type heedless struct{ blob.Store }

func (h heedless) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if err := h.Delete(ctx, name); err != nil && !errors.Is(err, blob.ErrNotFound) {
		return err
	}
	return h.Store.Put(ctx, name, r, size)
}

func TestInitRefusesStorageThatReplaces(t *testing.T) {
	d, err := blob.CreateDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := initOn(t.Context(), heedless{d}, "x"); err == nil || !strings.Contains(err.Error(), "If-None-Match") {
		t.Errorf("Init: %v", err)
	}
}
