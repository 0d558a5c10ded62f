package s3test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/tidemark/tidemark/store/blob/s3"
)

// Trouble is what a network does to a request.
type Trouble string

// Troubles.
const (
	Refused   Trouble = "refused"    // it never got there
	TornSend  Trouble = "torn send"  // half of its body got there
	Lost      Trouble = "lost"       // it got there; the answer did not come back
	TornReply Trouble = "torn reply" // half of the answer's body came back
	Twice     Trouble = "twice"      // it got there twice; the second answer came back
	Busy      Trouble = "busy"       // 503 SlowDown
	Internal  Trouble = "internal"   // 500 InternalError, though it was done
	Slow      Trouble = "slow"
)

// Troubles lists them all.
func Troubles() []Trouble {
	return []Trouble{Refused, TornSend, Lost, TornReply, Twice, Busy, Internal, Slow}
}

// ErrNetwork is what lost requests and answers end with.
var ErrNetwork = errors.New("connection reset by a test")

// Network does trouble to requests as plan says; plan is called for one at a time, n counts from 1.
type Network struct {
	plan func(n int, r *http.Request) Trouble
	next s3.Doer

	mu   sync.Mutex
	n    int
	seen map[Trouble]int
}

// Seen tells how many requests met which trouble.
func (w *Network) Seen() map[Trouble]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.seen)
}

// NewNetwork returns a network whose plan is called for one request at a time; n counts them from 1.
func NewNetwork(plan func(n int, r *http.Request) Trouble) *Network {
	return &Network{plan: plan, seen: map[Trouble]int{}}
}

// Randomly makes trouble for one in so many requests.
func Randomly(seed uint64, oneIn int) func(int, *http.Request) Trouble {
	rnd := rand.New(rand.NewPCG(seed, 2))
	kinds := Troubles()
	return func(int, *http.Request) Trouble {
		if rnd.IntN(oneIn) != 0 {
			return ""
		}
		return kinds[rnd.IntN(len(kinds))]
	}
}

// Wrap is for s3.Options.
func (w *Network) Wrap(next s3.Doer) s3.Doer {
	w.next = next
	return w
}

// Do implements s3.Doer.
func (w *Network) Do(r *http.Request) (*http.Response, error) {
	w.mu.Lock()
	w.n++
	t := w.plan(w.n, r)
	w.seen[t]++
	w.mu.Unlock()
	switch t {
	case Refused:
		return nil, ErrNetwork
	case Busy:
		return Answer(r, http.StatusServiceUnavailable, "SlowDown"), nil
	case Slow:
		time.Sleep(20 * time.Millisecond)
	case TornSend:
		if r.Body != nil && r.ContentLength > 1 {
			r.Body = readCloser{io.MultiReader(io.LimitReader(r.Body, r.ContentLength/2), failing{}), r.Body}
			resp, err := w.next.Do(r)
			if err == nil { // the server must not take half for the whole
				drain(resp)
				if resp.StatusCode < 300 {
					return nil, fmt.Errorf("the server accepted half a body: %s", resp.Status)
				}
			}
		}
		return nil, ErrNetwork
	case Lost, Internal:
		resp, err := w.next.Do(r)
		if err != nil {
			return nil, err
		}
		drain(resp)
		if t == Internal && resp.StatusCode < 300 {
			return Answer(r, http.StatusInternalServerError, "InternalError"), nil
		}
		return nil, fmt.Errorf("read: %w (%w)", io.EOF, ErrNetwork) // as net/http says it
	case TornReply:
		resp, err := w.next.Do(r)
		if err != nil || resp.ContentLength <= 1 || r.Method == http.MethodHead {
			return resp, err
		}
		resp.Body = readCloser{io.MultiReader(io.LimitReader(resp.Body, resp.ContentLength/2), failing{io.ErrUnexpectedEOF}), resp.Body}
		return resp, nil
	case Twice:
		if resp, err := w.once(r); err == nil {
			drain(resp)
		}
		return w.once(r)
	}
	return w.next.Do(r)
}

// once sends a copy of r.
func (w *Network) once(r *http.Request) (*http.Response, error) {
	c := r.Clone(r.Context())
	if r.Body != nil {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		c.Body, r.Body = io.NopCloser(bytes.NewReader(b)), io.NopCloser(bytes.NewReader(b))
	}
	return w.next.Do(c)
}

type readCloser struct {
	io.Reader
	io.Closer
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	return 0, ErrNetwork
}

func drain(r *http.Response) {
	_, _ = io.Copy(io.Discard, r.Body)
	_ = r.Body.Close()
}

// Answer makes up an answer, with an error code in its body.
func Answer(r *http.Request, status int, code string) *http.Response {
	body := `<?xml version="1.0"?><Error><Code>` + code + `</Code><Message>by a test</Message></Error>`
	return &http.Response{
		Status: http.StatusText(status), StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Content-Type": {"application/xml"}}, ContentLength: int64(len(body)),
		Body: io.NopCloser(strings.NewReader(body)), Request: r,
	}
}
