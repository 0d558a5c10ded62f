package s3

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/store/blob"
)

// putKey is the user metadata that says which Put made an object. So a Put whose answer
// was lost, and which then finds the name taken, knows whether by itself.
const putKey = "tidemark-put"

// abortTimeout bounds the tidying after an upload that failed.
const abortTimeout = 10 * time.Second

// Put implements [blob.Store]. The object is created by one conditional request, or by the
// one that completes a multipart upload. If neither an answer nor the object's metadata can be had, the
// error does not wrap ErrExists, and the object may exist, whole.
func (s *Store) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if err := s.put(ctx, name, r, size); err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	return nil
}

func (s *Store) put(ctx context.Context, name string, r io.Reader, size int64) error {
	key, err := s.key(name)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("negative size %d", size)
	}
	u := &upload{s: s, key: key, src: &source{ctx: ctx, r: r, left: size}, id: map[string]string{putKey: rand.Text()}}
	if size <= wholeParts*s.partSize {
		return u.whole(ctx, size)
	}
	return u.multipart(ctx, size)
}

// upload is one Put.
type upload struct {
	s   *Store
	key *string
	src *source
	id  map[string]string
}

func (u *upload) whole(ctx context.Context, size int64) error {
	body, err := u.src.take(size)
	if err != nil {
		return err
	}
	sum, err := checksum(body)
	if err != nil {
		return err
	}
	return u.create(ctx, size, func(ctx context.Context) error {
		if _, err := body.Seek(0, io.SeekStart); err != nil {
			return err
		}
		_, err := u.s.client.PutObject(ctx, &s3.PutObjectInput{
			Bucket: u.s.bucket(), Key: u.key, Body: body, ContentLength: aws.Int64(size), ChecksumCRC32C: sum,
			IfNoneMatch: aws.String("*"), Metadata: u.id,
		})
		return err
	})
}

// create repeats try, which creates the object if its key is free. It returns nil
// if the object that is there afterwards is this upload's.
func (u *upload) create(ctx context.Context, size int64, try func(context.Context) error) error {
	err := u.s.retry(ctx, size, try)
	if err == nil || ctx.Err() != nil || errors.Is(err, errNoBucket) {
		return err
	}
	// Somebody was first, or it was this Put, the answer to which was lost: the last
	// answer alone does not tell.
	mine, herr := u.mine(ctx)
	switch {
	case mine:
		return nil
	case herr == nil:
		return fmt.Errorf("%w (%w)", blob.ErrExists, err)
	case !errors.Is(herr, blob.ErrNotFound):
		return fmt.Errorf("%w; whether it was created is not known: %w", err, herr)
	case errors.Is(err, blob.ErrNotFound): // the multipart upload, not the object
		return errors.New(err.Error())
	}
	return err
}

// mine tells whether the object that has the key now was made by this upload.
func (u *upload) mine(ctx context.Context) (bool, error) {
	out, err := u.s.head(ctx, u.key)
	if err != nil {
		return false, err
	}
	return out.Metadata[putKey] == u.id[putKey], nil
}

func (u *upload) multipart(ctx context.Context, size int64) error {
	var id *string
	err := u.s.retry(ctx, 0, func(ctx context.Context) error {
		out, err := u.s.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{
			Bucket: u.s.bucket(), Key: u.key, ChecksumAlgorithm: types.ChecksumAlgorithmCrc32c, Metadata: u.id,
		})
		if err == nil {
			id = out.UploadId
		}
		return err
	})
	if err != nil {
		return err
	}
	parts, err := u.parts(ctx, id, size)
	if err == nil {
		err = u.create(ctx, 0, func(ctx context.Context) error {
			_, err := u.s.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
				Bucket: u.s.bucket(), Key: u.key, UploadId: id, IfNoneMatch: aws.String("*"),
				MultipartUpload: &types.CompletedMultipartUpload{Parts: parts},
			})
			return err
		})
	}
	if err != nil {
		u.abort(ctx, id)
	}
	return err
}

// parts uploads the parts, some at a time.
func (u *upload) parts(ctx context.Context, id *string, size int64) ([]types.CompletedPart, error) {
	partSize := max(u.s.partSize, (size+maxParts-1)/maxParts)
	parts := make([]types.CompletedPart, (size+partSize-1)/partSize)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(partsAtOnce)
	var readErr error
	for i := range parts {
		n := min(partSize, size-int64(i)*partSize)
		body, err := u.src.take(n)
		if err != nil {
			readErr = err
			break
		}
		if gctx.Err() != nil {
			break
		}
		g.Go(func() (err error) {
			parts[i], err = u.part(gctx, id, int32(i+1), body, n)
			return err
		})
	}
	err := g.Wait()
	if readErr != nil {
		err = readErr
	}
	return parts, err
}

func (u *upload) part(ctx context.Context, id *string, number int32, body io.ReadSeeker, n int64) (types.CompletedPart, error) {
	sum, err := checksum(body)
	if err != nil {
		return types.CompletedPart{}, err
	}
	p := types.CompletedPart{PartNumber: aws.Int32(number), ChecksumCRC32C: sum}
	err = u.s.retry(ctx, n, func(ctx context.Context) error {
		if _, err := body.Seek(0, io.SeekStart); err != nil {
			return err
		}
		out, err := u.s.client.UploadPart(ctx, &s3.UploadPartInput{
			Bucket: u.s.bucket(), Key: u.key, UploadId: id, PartNumber: p.PartNumber,
			Body: body, ContentLength: aws.Int64(n), ChecksumCRC32C: sum,
		})
		if err == nil {
			p.ETag = out.ETag
		}
		return err
	})
	return p, err
}

// abort frees the parts. Failing to changes nothing but the bill.
func (u *upload) abort(ctx context.Context, id *string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
	defer cancel()
	_, _ = u.s.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: u.s.bucket(), Key: u.key, UploadId: id})
}

// source cuts a reader into bodies that can be sent more than once.
type source struct {
	ctx  context.Context
	r    io.Reader
	left int64
}

// take returns the next n bytes. Taking the last makes sure that nothing follows
// them. Packs, being bytes in memory already, are not copied.
func (s *source) take(n int64) (io.ReadSeeker, error) {
	s.left -= n
	if b, ok := s.r.(*bytes.Reader); ok {
		at := b.Size() - int64(b.Len())
		if n > int64(b.Len()) {
			return nil, fmt.Errorf("%d bytes missing: %w", n-int64(b.Len()), io.ErrUnexpectedEOF)
		}
		if s.left == 0 && n < int64(b.Len()) {
			return nil, errors.New("more bytes than announced")
		}
		// b is moved past them, and read by position from now on.
		if _, err := b.Seek(n, io.SeekCurrent); err != nil {
			return nil, err
		}
		return io.NewSectionReader(b, at, n), nil
	}
	var buf bytes.Buffer
	buf.Grow(int(n) + bytes.MinRead)
	r := cancellable{s.ctx, s.r}
	got, err := io.CopyN(&buf, r, n)
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%d bytes missing: %w", n-got, io.ErrUnexpectedEOF)
	}
	if err != nil {
		return nil, err
	}
	if s.left == 0 {
		var more [1]byte
		switch _, err := io.ReadFull(r, more[:]); {
		case err == nil:
			return nil, errors.New("more bytes than announced")
		case !errors.Is(err, io.EOF):
			return nil, err
		}
	}
	return bytes.NewReader(buf.Bytes()), nil
}

type cancellable struct {
	ctx context.Context
	r   io.Reader
}

func (c cancellable) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// checksum is what the server compares the body with, beside its length.
func checksum(body io.ReadSeeker) (*string, error) {
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	if _, err := io.Copy(h, body); err != nil {
		return nil, err
	}
	return aws.String(base64.StdEncoding.EncodeToString(h.Sum(nil))), nil
}
