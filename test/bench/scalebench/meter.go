package main

import (
	"context"
	"io"
	"iter"
	"strings"
	"sync/atomic"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/s3"
)

// meter counts requests.
type meter struct {
	blob.Store
	requests, bytes atomic.Int64 // bytes that were read
	writes, deletes atomic.Int64 // of the requests
}

// meter opens the repository's storage.
func (o options) meter(ctx context.Context) (*meter, error) {
	where, ok := strings.CutPrefix(o.location, "s3:")
	if !ok {
		b, err := blob.OpenDir(o.location)
		return &meter{Store: b}, err
	}
	l, err := s3.Parse(where)
	if err != nil {
		return nil, err
	}
	b, err := s3.Open(ctx, l, s3.Options{})
	return &meter{Store: b}, err
}

func (m *meter) count(n int) {
	m.requests.Add(1)
	m.bytes.Add(int64(n))
}

func (m *meter) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	n, err := m.Store.ReadAt(ctx, name, p, off)
	m.count(n)
	return n, err
}

func (m *meter) ReadTail(ctx context.Context, name string, p []byte) (int, int64, error) {
	n, size, err := blob.ReadTail(ctx, m.Store, name, p)
	m.count(n)
	return n, size, err
}

func (m *meter) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error) {
	m.count(0)
	r, err := m.Store.Get(ctx, name, off, n)
	return &metered{r, m}, err
}

func (m *meter) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	m.writes.Add(1)
	m.count(0)
	return m.Store.Put(ctx, name, r, size)
}

func (m *meter) Delete(ctx context.Context, name string) error {
	m.deletes.Add(1)
	m.count(0)
	return m.Store.Delete(ctx, name)
}

// metered counts bytes that are read.
type metered struct {
	io.ReadCloser
	m *meter
}

func (r *metered) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.m.bytes.Add(int64(n))
	return n, err
}

func (m *meter) Stat(ctx context.Context, name string) (blob.Info, error) {
	m.count(0)
	return m.Store.Stat(ctx, name)
}

// List counts what object storage would be asked: a page for every 1,000 names.
func (m *meter) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		n := 0
		for info, err := range m.Store.List(ctx, prefix) {
			if n%1000 == 0 {
				m.count(0)
			}
			n++
			if !yield(info, err) {
				return
			}
		}
	}
}
