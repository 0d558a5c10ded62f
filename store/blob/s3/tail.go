package s3

import (
	"context"
	"fmt"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/tidemark/tidemark/store/blob"
)

var _ blob.TailReader = (*Store)(nil)

// ReadTail implements [blob.TailReader]. It costs one request, with a suffix range (RFC 9110, 14.1.2);
// where the server answers with the whole object, two.
func (s *Store) ReadTail(ctx context.Context, name string, p []byte) (n int, size int64, err error) {
	n, size, err = s.readTail(ctx, name, p)
	if err != nil {
		err = fmt.Errorf("read %s: %w", name, err)
	}
	return n, size, err
}

func (s *Store) readTail(ctx context.Context, name string, p []byte) (done int, size int64, err error) {
	r, err := s.reader(ctx, name, 0, -1)
	if err != nil {
		return 0, 0, err
	}
	if len(p) == 0 {
		out, err := s.head(ctx, r.key)
		if err != nil {
			return 0, 0, err
		}
		return 0, aws.ToInt64(out.ContentLength), nil
	}
	for !r.known || !r.atEnd() {
		err := s.retry(ctx, int64(len(p)-done), func(ctx context.Context) error {
			var n int
			var err error
			if r.known { // the first answer ended early
				n, err = r.some(ctx, p[done:])
			} else if err = r.requestTail(ctx, len(p)); err == nil {
				p = p[:r.end-r.off]
				n, err = r.drain(p)
			}
			if done += n; n > 0 {
				return nil
			}
			return err
		})
		if err != nil {
			return done, r.size, err
		}
	}
	return done, r.size, nil
}

// requestTail asks for the last n bytes, and learns the object's size.
func (r *reader) requestTail(ctx context.Context, n int) error {
	out, err := r.s.client.GetObject(ctx, &s3.GetObjectInput{
		Bucket: r.s.bucket(), Key: r.key, Range: aws.String(fmt.Sprintf("bytes=-%d", n)),
	})
	if status(err) == http.StatusRequestedRangeNotSatisfiable { // an object without bytes has no end
		r.known, r.off, r.end = true, 0, 0
		return nil
	}
	if err != nil {
		return err
	}
	r.off = 0
	if out.ContentRange != nil {
		first, size, err := parseContentRange(*out.ContentRange)
		if err == nil && first != max(0, size-int64(n)) {
			err = fmt.Errorf("asked for the last %d bytes of %d, the server answered with bytes from %d", n, size, first)
		}
		if err != nil {
			_ = out.Body.Close()
			return &blobError{err}
		}
		r.off = first
	}
	if err := r.accept(out); err != nil {
		_ = out.Body.Close()
		return err
	}
	r.body = out.Body
	if r.size-r.off > int64(n) { // the whole object: it is asked for again, from where it is wanted
		r.drop()
		r.off = r.size - int64(n)
	}
	return nil
}

// drain reads of the answer what fits into p, and gives it up.
func (r *reader) drain(p []byte) (done int, err error) {
	defer r.drop()
	for r.body != nil && done < len(p) && !r.atEnd() {
		n, err := r.fetch(p[done:])
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}
