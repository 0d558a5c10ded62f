package blob_test

import (
	"testing"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/blobtest"
)

// plain hides what a store can beyond [blob.Store].
type plain struct{ blob.Store }

func TestTailOfAStoreThatHasNoneOfItsOwn(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store { return plain{newDir(t)} })
}
