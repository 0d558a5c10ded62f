package s3_test

import (
	"encoding/pem"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/blobtest"
	"github.com/tidemark/tidemark/store/blob/s3"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

// tlsServer puts TLS before srv, and returns it with the file of its certificate.
func tlsServer(t *testing.T, srv *s3test.Server) (tlsSrv *s3test.Server, caFile string) {
	t.Helper()
	to, err := url.Parse(srv.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewTLSServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		r.Out.Host = r.In.Host // it is signed
	}})
	t.Cleanup(front.Close)
	caFile = filepath.Join(t.TempDir(), "ca.pem")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw})
	if err := os.WriteFile(caFile, cert, 0o600); err != nil {
		t.Fatal(err)
	}
	return &s3test.Server{Endpoint: front.URL, Dir: srv.Dir}, caFile
}

// Over TLS the SDK signs and sums bodies in other ways.
func TestConformsOverTLS(t *testing.T) {
	srv, ca := tlsServer(t, s3test.Start(t))
	t.Setenv("AWS_CA_BUNDLE", ca)
	blobtest.Run(t, func(t *testing.T) blob.Store { return open(t, srv, s3.Options{}) })
	t.Run("Multipart", func(t *testing.T) {
		s := open(t, srv, s3.Options{PartSize: 5 << 20})
		content := pattern(1, 21<<20)
		if err := s.Put(t.Context(), "big", strings.NewReader(string(content)), int64(len(content))); err != nil {
			t.Fatal(err)
		}
		wantObject(t, s, "big", content)
	})
}

func TestCertificates(t *testing.T) {
	srv, ca := tlsServer(t, s3test.Start(t))
	began := time.Now()
	_, err := open(t, srv, s3.Options{}).Stat(t.Context(), "a")
	if err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a certificate that nobody signed: %v", err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("that was tried again, for %s", d)
	}
	l, err := s3.Parse(srv.Endpoint + "/" + s3test.Bucket + "/x?ca-file=" + url.QueryEscape(ca))
	if err != nil {
		t.Fatal(err)
	}
	s, err := s3.Open(t.Context(), l, s3.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), "a", strings.NewReader("x"), 1); err != nil {
		t.Error(err)
	}
	l.CAFile = os.DevNull
	if _, err := s3.Open(t.Context(), l, s3.Options{}); err == nil {
		t.Error("a file without certificates was accepted")
	}
}
