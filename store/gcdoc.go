package store

import (
	"context"
	"errors"
	"strings"
	"time"
)

// A collection says which packs it is about to delete or to compact before it does,
// see docs/gc.md. Its objects are
//
//	gc/<time>-<16 hex>         condemned packs
//	gc/<time>-<16 hex>.wait    the sessions that may have begun without seeing it
//	gc/<time>-<16 hex>.done    nothing is left to do; where collections cannot lock each
//	                           other out, it stays for a day
const (
	gcPrefix   = "gc/"
	waitSuffix = ".wait"

	// maxCondemned bounds one document, and what it costs each writer: 16 bytes
	// of memory per pack.
	maxCondemned = 1 << 16
)

type condemnedDoc struct {
	Time    time.Time `json:"time"`
	Process process   `json:"process"`
	Packs   []packAt  `json:"packs"`
}

type waitDoc struct {
	Sessions []string `json:"sessions"`
}

type doneDoc struct {
	Time time.Time `json:"time"`
}

// verdict is what a listing shows of one document of a collection.
type verdict struct {
	name string
	doc  *condemnedDoc // nil if its object is gone
	wait *waitDoc
	done *doneDoc
}

// verdicts lists the documents of all collections.
func (r *Repo) verdicts(ctx context.Context) ([]*verdict, error) {
	names, err := r.names(ctx, gcPrefix)
	if err != nil {
		return nil, err
	}
	byName := map[string]*verdict{}
	var out []*verdict
	for _, object := range names {
		name := strings.TrimSuffix(strings.TrimSuffix(object, waitSuffix), doneSuffix)
		v := byName[name]
		if v == nil {
			v = &verdict{name: name}
			byName[name] = v
			out = append(out, v)
		}
		var err error
		switch {
		case strings.HasSuffix(object, waitSuffix):
			var d waitDoc
			if err = r.document(ctx, object, "gc-wait", &d); err == nil {
				v.wait = &d
			}
		case strings.HasSuffix(object, doneSuffix):
			var d doneDoc
			if err = r.document(ctx, object, "gc-done", &d); err == nil {
				v.done = &d
			}
		default:
			var d condemnedDoc
			if err = r.document(ctx, object, "gc", &d); err == nil {
				v.doc = &d
			}
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	return out, nil
}

// condemned returns the packs that nothing new may refer to.
func (r *Repo) condemned(ctx context.Context) (map[PackID]struct{}, error) {
	vs, err := r.verdicts(ctx)
	if err != nil {
		return nil, err
	}
	out := map[PackID]struct{}{}
	for _, v := range vs {
		if v.doc == nil {
			continue
		}
		for _, p := range v.doc.Packs {
			out[p.Pack] = struct{}{}
		}
	}
	return out, nil
}

// dropVerdict deletes a document: the list first, so that what is left of it, if this
// is interrupted, condemns nothing.
func (r *Repo) dropVerdict(ctx context.Context, v *verdict) error {
	return r.removed(ctx, v.name, v.name+waitSuffix, v.name+doneSuffix)
}
