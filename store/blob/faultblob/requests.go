package faultblob

import (
	"io"
	"net/http"
)

// Doer sends one request, as s3.Doer does.
type Doer interface {
	Do(*http.Request) (*http.Response, error)
}

// Requests makes moments of the requests that d sends: before one is sent, when half of its body was
// read to be sent, and when it was answered and nobody knows yet.
func (l *Layer) Requests(d Doer) Doer { return &requests{l, d} }

type requests struct {
	l    *Layer
	next Doer
}

func (d *requests) Do(r *http.Request) (*http.Response, error) {
	ctx, op, name := r.Context(), Op(requestPrefix+r.Method), r.URL.Path
	if err := d.l.at(ctx, op, Before, name); err != nil && !isRepeat(err) {
		return nil, err
	}
	if r.Body != nil && r.ContentLength > 1 {
		middle := hook(func() error {
			if err := d.l.at(ctx, op, Middle, name); err != nil && !isRepeat(err) {
				return err
			}
			return nil
		})
		half := io.LimitReader(r.Body, r.ContentLength/2)
		r.Body = struct {
			io.Reader
			io.Closer
		}{io.MultiReader(half, middle, r.Body), r.Body}
	}
	resp, err := d.next.Do(r)
	if err != nil {
		return nil, err
	}
	if err := d.l.at(ctx, op, After, name); err != nil && !isRepeat(err) {
		_ = resp.Body.Close()
		return nil, err
	}
	return resp, nil
}
