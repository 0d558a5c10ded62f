package s3_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/blobtest"
	"github.com/tidemark/tidemark/store/blob/s3"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

var prefixes atomic.Int64

// open opens a new empty place on the server.
func open(t testing.TB, srv *s3test.Server, o s3.Options) *s3.Store {
	t.Helper()
	if o.RetryFor == 0 {
		o.RetryFor = 10 * time.Second
	}
	l := s3.Location{Endpoint: srv.Endpoint, Bucket: s3test.Bucket, Prefix: fmt.Sprintf("p%d", prefixes.Add(1))}
	s, err := s3.Open(t.Context(), l, o)
	if err != nil {
		t.Fatal(err)
	}
	s3.RetrySoon(s)
	return s
}

func TestConforms(t *testing.T) {
	srv := s3test.Start(t)
	blobtest.Run(t, func(t *testing.T) blob.Store { return open(t, srv, s3.Options{}) })
}
