package s3_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/blobtest"
	"github.com/tidemark/tidemark/store/blob/faultblob"
	"github.com/tidemark/tidemark/store/blob/s3"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

// Retries must hide all of this: the whole contract holds over a bad network.
func TestConformsOverBadNetwork(t *testing.T) {
	srv := s3test.Start(t)
	var seed atomic.Uint64
	var mu sync.Mutex
	seen := map[s3test.Trouble]int{}
	blobtest.Run(t, func(t *testing.T) blob.Store {
		w := s3test.NewNetwork(s3test.Randomly(seed.Add(1), 3))
		t.Cleanup(func() {
			mu.Lock()
			defer mu.Unlock()
			for k, n := range w.Seen() {
				seen[k] += n
			}
		})
		return open(t, srv, s3.Options{Wrap: w.Wrap, RetryFor: time.Minute})
	})
	t.Logf("%v", seen)
	for _, k := range s3test.Troubles() {
		if seen[k] == 0 {
			t.Errorf("no request was %s", k)
		}
	}
}

// Where retries end soon, failures are seen; and what is seen is true.
func TestOverBadNetworkWithoutPatience(t *testing.T) {
	srv := s3test.Start(t)
	blobtest.Faults(t, 8, func(t *testing.T, seed uint64) (blob.Store, func()) {
		var calm atomic.Bool
		bad := s3test.Randomly(seed, 3)
		w := s3test.NewNetwork(func(n int, r *http.Request) s3test.Trouble {
			if t := bad(n, r); !calm.Load() {
				return t
			}
			return ""
		})
		return open(t, srv, s3.Options{Wrap: w.Wrap, RetryFor: time.Nanosecond}), func() { calm.Store(true) }
	})
}

func TestConformsOutOfOrder(t *testing.T) {
	srv := s3test.Start(t)
	var seed atomic.Uint64
	blobtest.Run(t, func(t *testing.T) blob.Store {
		return faultblob.New(faultblob.Delays(seed.Add(1), 3*time.Millisecond)).Over(open(t, srv, s3.Options{}))
	})
}

func TestBelowFaults(t *testing.T) {
	srv := s3test.Start(t)
	blobtest.Faults(t, 8, func(t *testing.T, seed uint64) (blob.Store, func()) {
		var calm atomic.Bool
		l := faultblob.New(faultblob.Until(&calm, faultblob.Random(seed, 8)))
		return l.Over(open(t, srv, s3.Options{})), func() { calm.Store(true) }
	})
}

func pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	rnd := rand.New(rand.NewPCG(seed, 3))
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	return b
}

func TestMultipart(t *testing.T) {
	srv := s3test.Start(t)
	const size = 4*5<<20 + 12345 // one more than goes in one request
	content := pattern(1, size)
	for _, tt := range []struct {
		name string
		plan func(n int, r *http.Request) s3test.Trouble
	}{
		{"quiet", func(int, *http.Request) s3test.Trouble { return "" }},
		{"bad network", s3test.Randomly(7, 3)},
		{"answer to the end lost", func(_ int, r *http.Request) s3test.Trouble {
			if r.Method == http.MethodPost && r.URL.Query().Has("uploadId") {
				return s3test.Lost
			}
			return ""
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := s3test.NewNetwork(tt.plan)
			s := open(t, srv, s3.Options{PartSize: 5 << 20, Wrap: w.Wrap, RetryFor: 5 * time.Second})
			for i, r := range []io.Reader{bytes.NewReader(content), io.MultiReader(bytes.NewReader(content))} {
				name := fmt.Sprintf("big/%d", i)
				if err := s.Put(t.Context(), name, r, size); err != nil {
					t.Fatal(err)
				}
				wantObject(t, s, name, content)
				if err := s.Put(t.Context(), name, bytes.NewReader(pattern(2, size)), size); !errors.Is(err, blob.ErrExists) {
					t.Fatalf("second Put: %v", err)
				}
				wantObject(t, s, name, content)
			}
			if err := s.Put(t.Context(), "short", bytes.NewReader(content[1:]), size); err == nil {
				t.Error("a short Put succeeded")
			}
			if err := s.Put(t.Context(), "long", io.MultiReader(bytes.NewReader(content), strings.NewReader("x")), size); err == nil {
				t.Error("a long Put succeeded")
			}
			for _, name := range []string{"short", "long"} {
				if _, err := s.Stat(t.Context(), name); !errors.Is(err, blob.ErrNotFound) {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
}

func wantObject(t *testing.T, s *s3.Store, name string, content []byte) {
	t.Helper()
	r, err := s.Get(t.Context(), name, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) {
		t.Fatalf("%s: %d bytes that differ from the %d put", name, len(got), len(content))
	}
}

// isPut picks the request that creates an object at once.
func isPut(r *http.Request) bool {
	return r.Method == http.MethodPut && r.URL.RawQuery == "x-id=PutObject"
}

// The answer to the first PUT is lost: the second finds the name taken, by the first.
func TestPutWhoseAnswerWasLost(t *testing.T) {
	srv := s3test.Start(t)
	for _, kind := range []s3test.Trouble{s3test.Lost, s3test.Internal, s3test.Twice} {
		t.Run(string(kind), func(t *testing.T) {
			puts := 0
			w := s3test.NewNetwork(func(_ int, r *http.Request) s3test.Trouble {
				if isPut(r) {
					if puts++; puts == 1 {
						return kind
					}
				}
				return ""
			})
			s := open(t, srv, s3.Options{Wrap: w.Wrap})
			if err := s.Put(t.Context(), "a", strings.NewReader("mine"), 4); err != nil {
				t.Fatal(err)
			}
			wantObject(t, s, "a", []byte("mine"))
			if puts == 0 {
				t.Fatal("no PUT was seen")
			}
			// The same bytes put by another are another's all the same.
			if err := s.Put(t.Context(), "a", strings.NewReader("mine"), 4); !errors.Is(err, blob.ErrExists) {
				t.Errorf("Put by another: %v", err)
			}
		})
	}
}

// The name was another's before, and the answer that would say so is lost.
func TestPutOfTakenNameWhoseAnswerWasLost(t *testing.T) {
	srv := s3test.Start(t)
	puts := 0
	w := s3test.NewNetwork(func(_ int, r *http.Request) s3test.Trouble {
		if isPut(r) {
			if puts++; puts == 2 {
				return s3test.Lost
			}
		}
		return ""
	})
	s := open(t, srv, s3.Options{Wrap: w.Wrap})
	if err := s.Put(t.Context(), "a", strings.NewReader("his"), 3); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), "a", strings.NewReader("her"), 3); !errors.Is(err, blob.ErrExists) {
		t.Errorf("Put: %v", err)
	}
	wantObject(t, s, "a", []byte("his"))
	if puts != 3 {
		t.Errorf("%d PUTs", puts)
	}
}

// All answers to PUTs are lost for longer than is retried: what is there tells.
func TestPutThatNeverHearsBack(t *testing.T) {
	srv := s3test.Start(t)
	w := s3test.NewNetwork(func(_ int, r *http.Request) s3test.Trouble {
		if isPut(r) {
			return s3test.Lost
		}
		return ""
	})
	s := open(t, srv, s3.Options{Wrap: w.Wrap, RetryFor: 200 * time.Millisecond})
	if err := s.Put(t.Context(), "a", strings.NewReader("x"), 1); err != nil {
		t.Errorf("it is there, and the Put says: %v", err)
	}
	deaf := s3test.NewNetwork(func(int, *http.Request) s3test.Trouble { return s3test.Lost })
	s = open(t, srv, s3.Options{Wrap: deaf.Wrap, RetryFor: 200 * time.Millisecond})
	err := s.Put(t.Context(), "a", strings.NewReader("x"), 1)
	if err == nil || errors.Is(err, blob.ErrExists) || !strings.Contains(err.Error(), "not known") {
		t.Errorf("a Put without any answer: %v", err)
	}
}

// A connection that ends says nothing about where the object ends.
func TestTornAnswersAreNoEnds(t *testing.T) {
	srv := s3test.Start(t)
	content := pattern(3, 100<<10)
	down := false
	w := s3test.NewNetwork(func(_ int, r *http.Request) s3test.Trouble {
		switch {
		case r.Method != http.MethodGet:
			return ""
		case down:
			return s3test.Lost
		}
		return s3test.TornReply
	})
	s := open(t, srv, s3.Options{Wrap: w.Wrap, RetryFor: 300 * time.Millisecond})
	if err := s.Put(t.Context(), "a", bytes.NewReader(content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, len(content))
	if n, err := s.ReadAt(t.Context(), "a", p, 0); err != nil || !bytes.Equal(p, content) {
		t.Errorf("ReadAt, half at a time: %d, %v", n, err)
	}
	wantObject(t, s, "a", content)
	down = true
	n, err := s.ReadAt(t.Context(), "a", p, 0)
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("ReadAt without a network: %d, %v", n, err)
	}
	_, err = s.Get(t.Context(), "a", 0, -1)
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, blob.ErrNotFound) {
		t.Errorf("Get without a network: %v", err)
	}
}

// A server that takes no notice of the range, or sends another, gives an error, not
// wrong bytes.
func TestWrongRanges(t *testing.T) {
	for name, value := range s3test.Env() {
		t.Setenv(name, value)
	}
	for _, tt := range []struct {
		name, contentRange, body string
		status                   int
	}{
		{"ignored", "", "0123456789", 200},
		{"other bytes", "bytes 1-3/10", "123", 206},
		{"nonsense", "bytes 4-/10", "456", 206},
		{"beyond", "bytes 4-6/5", "456", 206},
		{"no range", "", "456", 206},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := doerFunc(func(r *http.Request) (*http.Response, error) {
				resp := s3test.Answer(r, tt.status, "")
				resp.Body, resp.ContentLength = io.NopCloser(strings.NewReader(tt.body)), int64(len(tt.body))
				resp.Header = http.Header{"Content-Length": {fmt.Sprint(len(tt.body))}}
				if tt.contentRange != "" {
					resp.Header.Set("Content-Range", tt.contentRange)
				}
				return resp, nil
			})
			s, err := s3.Open(t.Context(), s3.Location{Endpoint: "http://127.0.0.1:1", Bucket: "bucket"},
				s3.Options{RetryFor: 50 * time.Millisecond, Wrap: func(s3.Doer) s3.Doer { return server }})
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, 3)
			if n, err := s.ReadAt(t.Context(), "a", p, 4); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("ReadAt = %q, %v", p[:n], err)
			}
			if r, err := s.Get(t.Context(), "a", 4, 3); err == nil {
				b, err := io.ReadAll(r)
				t.Errorf("Get = %q, %v", b, err)
			}
		})
	}
}

type doerFunc func(*http.Request) (*http.Response, error)

func (f doerFunc) Do(r *http.Request) (*http.Response, error) { return f(r) }
