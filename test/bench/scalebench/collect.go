package main

import (
	"context"
	"errors"
	"time"

	"github.com/tidemark/tidemark/store"
	"github.com/tidemark/tidemark/store/blob"
)

// collected is what a garbage collection did and cost.
type collected struct {
	Report            store.GCReport
	Seconds           float64
	Requests          int64 // of them:
	Writes, Deletes   int64
	Read              int64 // bytes
	Marking, Choosing phase // of the first marking, and of the look at packs after it
}

// phase is a part of it.
type phase struct {
	Seconds  float64
	Requests int64
}

// forgetHalf forgets every second point and returns how many.
func forgetHalf(ctx context.Context, o options) (n int, err error) {
	r, err := store.Open(ctx, o.location)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	names, err := r.Points(ctx, vm)
	if err != nil {
		return 0, err
	}
	var half []store.PointName
	for i := 0; i < len(names); i += 2 {
		half = append(half, names[i])
	}
	forgotten, err := r.Forget(ctx, half, nil)
	return len(forgotten), err
}

// collect collects garbage, with the storage's lock where it has one.
func collect(ctx context.Context, o options) (c collected, err error) {
	m, err := o.meter(ctx)
	if err != nil {
		return c, err
	}
	var b blob.Store = m
	if l, ok := m.Store.(blob.Locker); ok {
		b = struct {
			*meter
			blob.Locker
		}{m, l}
	}
	r, err := store.OpenIn(ctx, b, o.location)
	if err != nil {
		return c, errors.Join(err, m.Close())
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	begin := time.Now()
	var first, last string
	var at time.Time
	var requests int64
	c.Report, err = r.GC(ctx, store.GCOptions{Progress: func(what string, _, _ int64) {
		if what == last {
			return
		}
		now, n := time.Now(), m.requests.Load()
		switch { // the first time alone
		case first == "":
			first, at, requests = what, begin, 0
		case last == first && c.Marking.Requests == 0:
			c.Marking = phase{now.Sub(at).Seconds(), n - requests}
			at, requests = now, n
		case c.Choosing.Requests == 0:
			c.Choosing = phase{now.Sub(at).Seconds(), n - requests}
		}
		last = what
	}})
	if c.Choosing.Requests == 0 { // nothing came after it
		c.Choosing = phase{time.Since(at).Seconds(), m.requests.Load() - requests}
	}
	c.Seconds = time.Since(begin).Seconds()
	c.Requests, c.Writes, c.Deletes, c.Read = m.requests.Load(), m.writes.Load(), m.deletes.Load(), m.bytes.Load()
	return c, err
}
