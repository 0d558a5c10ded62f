package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/tidemark/tidemark/store/blob"
)

// Stat implements [blob.Store].
func (s *Store) Stat(ctx context.Context, name string) (blob.Info, error) {
	key, err := s.key(name)
	if err != nil {
		return blob.Info{}, fmt.Errorf("stat: %w", err)
	}
	out, err := s.head(ctx, key)
	if err != nil {
		return blob.Info{}, fmt.Errorf("stat %s: %w", name, err)
	}
	return blob.Info{Name: name, Size: aws.ToInt64(out.ContentLength)}, nil
}

func (s *Store) head(ctx context.Context, key *string) (out *s3.HeadObjectOutput, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err = s.retry(ctx, 0, func(ctx context.Context) (err error) {
		out, err = s.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: s.bucket(), Key: key})
		return err
	})
	if err == nil && out.ContentLength == nil {
		err = errors.New("the server does not tell the object's size")
	}
	return out, err
}

// ReadAt implements [blob.Store]. It costs one request.
func (s *Store) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	n, err := s.readAt(ctx, name, p, off)
	if err != nil && err != io.EOF { //nolint:errorlint // made here
		err = fmt.Errorf("read %s: %w", name, err)
	}
	return n, err
}

func (s *Store) readAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	r, err := s.reader(ctx, name, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	if len(p) == 0 {
		_, err := s.head(ctx, r.key)
		return 0, err
	}
	// What was read stays read, and who gets on is not out of patience.
	done := 0
	for done < len(p) && !r.atEnd() {
		err := r.s.retry(ctx, int64(len(p)-done), func(ctx context.Context) error {
			n, err := r.some(ctx, p[done:])
			if done += n; n > 0 {
				return nil
			}
			return err
		})
		if err != nil {
			return done, err
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

// some sends one request and reads what it gets of p.
func (r *reader) some(ctx context.Context, p []byte) (done int, err error) {
	if err := r.request(ctx); err != nil {
		return 0, err
	}
	return r.drain(p)
}

// Get implements [blob.Store]. The reader resumes after failures that may pass,
// with the bytes of the same object.
func (s *Store) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error) {
	r, err := s.reader(ctx, name, off, n)
	if err == nil {
		err = r.open()
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	return r, nil
}

func (s *Store) reader(ctx context.Context, name string, off, n int64) (*reader, error) {
	key, err := s.key(name)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if off < 0 {
		return nil, fmt.Errorf("negative offset %d", off)
	}
	r := &reader{s: s, ctx: ctx, name: name, key: key, off: off, end: 1<<63 - 1}
	if n >= 0 && n < r.end-off {
		r.end = off + n
	}
	return r, nil
}

var errReplaced error = &blobError{errors.New("the object was replaced while it was read")}

// reader reads a range of an object. Not safe for concurrent use.
type reader struct {
	s    *Store
	ctx  context.Context
	name string
	key  *string
	off  int64 // of the next byte
	end  int64 // of the range; of the object at most, once size is known

	known bool // an answer has come: size and etag are the object's
	size  int64
	etag  *string

	body   io.ReadCloser // of the answer that is being read, or nil
	cancel context.CancelFunc
}

func (r *reader) atEnd() bool { return r.off >= r.end }

// open sends the first request, so that the absence of the object is told early.
func (r *reader) open() error {
	if r.atEnd() {
		_, err := r.s.head(r.ctx, r.key)
		return err
	}
	return r.s.retry(r.ctx, 0, r.begin)
}

// begin sends a request whose answer may be read for longer than limited lasts.
func (r *reader) begin(limited context.Context) error {
	ctx, cancel := context.WithCancel(r.ctx)
	stop := context.AfterFunc(limited, cancel)
	err := r.request(ctx)
	if !stop() && err == nil {
		err = errTorn // too late
	}
	if err != nil || r.atEnd() {
		r.drop()
		cancel()
		return err
	}
	r.cancel = cancel
	return nil
}

// request asks for what is left of the range. The object ending before it is no
// error: then atEnd is true.
func (r *reader) request(ctx context.Context) error {
	in := &s3.GetObjectInput{Bucket: r.s.bucket(), Key: r.key, IfMatch: r.etag}
	last := ""
	if r.end != 1<<63-1 {
		last = strconv.FormatInt(r.end-1, 10)
	}
	in.Range = aws.String(fmt.Sprintf("bytes=%d-%s", r.off, last))
	out, err := r.s.client.GetObject(ctx, in)
	if status(err) == http.StatusRequestedRangeNotSatisfiable {
		if r.known && r.off < r.size {
			return errReplaced
		}
		r.end = r.off
		return nil
	}
	if err != nil {
		if status(err) == http.StatusPreconditionFailed {
			return errReplaced
		}
		return err
	}
	if err := r.accept(out); err != nil {
		_ = out.Body.Close()
		return err
	}
	r.body = out.Body
	return nil
}

// accept checks that the answer is for the range that was asked for.
func (r *reader) accept(out *s3.GetObjectOutput) error {
	var first, size int64
	if out.ContentRange != nil {
		var err error
		if first, size, err = parseContentRange(*out.ContentRange); err != nil {
			return &blobError{err}
		}
	} else { // the whole object
		if out.ContentLength == nil {
			return &blobError{errors.New("the server does not tell the object's size")}
		}
		size = *out.ContentLength
	}
	if first != r.off {
		return &blobError{fmt.Errorf("asked for bytes from %d, the server answered with bytes from %d", r.off, first)}
	}
	if r.known && size != r.size {
		return errReplaced
	}
	r.known, r.size, r.etag = true, size, out.ETag
	r.end = min(r.end, size)
	return nil
}

// parseContentRange reads "bytes FIRST-LAST/SIZE" (RFC 9110, 14.4).
func parseContentRange(s string) (first, size int64, err error) {
	bad := fmt.Errorf("the server answered with an invalid Content-Range %q", s)
	s, ok := strings.CutPrefix(s, "bytes ")
	span, all, ok2 := strings.Cut(s, "/")
	from, to, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, bad
	}
	f, err1 := strconv.ParseUint(from, 10, 63)
	l, err2 := strconv.ParseUint(to, 10, 63)
	n, err3 := strconv.ParseUint(all, 10, 63)
	if err1 != nil || err2 != nil || err3 != nil || f > l || l >= n {
		return 0, 0, bad
	}
	return int64(f), int64(n), nil
}

// fetch reads from the answer, at most to the range's end. An answer that ends
// too early is errTorn.
func (r *reader) fetch(p []byte) (int, error) {
	if left := r.end - r.off; int64(len(p)) > left {
		p = p[:left]
	}
	n, err := r.body.Read(p)
	r.off += int64(n)
	if err != nil && r.atEnd() {
		return n, nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = errTorn
	}
	return n, err
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if r.atEnd() {
		return 0, io.EOF
	}
	n := 0
	err := r.s.retry(r.ctx, int64(len(p)), func(limited context.Context) error {
		if r.body == nil {
			if err := r.begin(limited); err != nil || r.atEnd() {
				return err
			}
		}
		// The limit holds while somebody waits: whoever reads slowly is not a slow server.
		defer context.AfterFunc(limited, r.cancel)()
		var err error
		if n, err = r.fetch(p); err != nil {
			r.drop()
		}
		if n > 0 {
			return nil // the next call asks for the rest
		}
		return err
	})
	switch {
	case err != nil:
		return 0, fmt.Errorf("get %s: %w", r.name, err)
	case n == 0 && r.atEnd():
		return 0, io.EOF
	}
	return n, nil
}

// drop gives up the answer.
func (r *reader) drop() {
	if r.body != nil {
		_ = r.body.Close() // read only
		r.body = nil
	}
	if r.cancel != nil {
		r.cancel()
		r.cancel = nil
	}
}

// Close implements io.Closer.
func (r *reader) Close() error {
	r.drop()
	return nil
}
