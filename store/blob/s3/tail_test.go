package s3_test

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob/s3"
)

// What servers do with a range that names the end of an object.
func TestTailTakesOneRequest(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	const content = "0123456789"
	for _, tt := range []struct {
		name     string
		n        int
		size     int
		requests int64
		serve    func(w http.ResponseWriter, r *http.Request, content []byte)
	}{
		{"as asked", 4, 10, 1, serveRange},
		{"longer than the object", 40, 10, 1, serveRange},
		{"empty", 4, 0, 1, serveRange},
		{"whole instead", 4, 10, 2, func(w http.ResponseWriter, r *http.Request, content []byte) {
			if strings.HasPrefix(r.Header.Get("Range"), "bytes=-") {
				r.Header.Del("Range")
			}
			serveRange(w, r, content)
		}},
		{"torn", 4, 10, 2, func(w http.ResponseWriter, r *http.Request, content []byte) {
			if strings.HasPrefix(r.Header.Get("Range"), "bytes=-") {
				w.Header().Set("Content-Range", "bytes 6-9/10")
				w.Header().Set("Content-Length", "4")
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(content[6:8])
				return
			}
			serveRange(w, r, content)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var requests atomic.Int64
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !strings.HasSuffix(r.URL.Path, "/a") {
					return
				}
				requests.Add(1)
				tt.serve(w, r, []byte(content[:tt.size]))
			}))
			defer srv.Close()
			s, err := s3.Open(t.Context(), s3.Location{Endpoint: srv.URL, Bucket: "bucket"}, s3.Options{RetryFor: 5 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			s3.RetrySoon(s)
			defer func() { _ = s.Close() }()
			p := make([]byte, tt.n)
			n, size, err := s.ReadTail(t.Context(), "a", p)
			want := content[max(0, tt.size-tt.n):tt.size]
			if err != nil || size != int64(tt.size) || string(p[:n]) != want {
				t.Errorf("%q of %d, %v, want %q of %d", p[:n], size, err, want, tt.size)
			}
			if got := requests.Load(); got != tt.requests {
				t.Errorf("%d requests, want %d", got, tt.requests)
			}
		})
	}
}

// serveRange answers as S3 does: ranges, and 416 for an object without bytes.
func serveRange(w http.ResponseWriter, r *http.Request, content []byte) {
	if len(content) == 0 && r.Header.Get("Range") != "" {
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return
	}
	w.Header().Set("ETag", `"e"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}
