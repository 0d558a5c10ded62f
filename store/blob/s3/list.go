package s3

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/tidemark/tidemark/store/blob"
)

// List implements [blob.Store]. It costs one request per 1000 objects, and holds
// as many in memory. Keys that can't be an object's name are left out.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		if !validPrefix(prefix) {
			return // nothing can be named so
		}
		last := ""
		for page, err := range s.pages(ctx, prefix, nil) {
			if err != nil {
				yield(blob.Info{}, err)
				return
			}
			for _, o := range page.Contents {
				name, ok := s.name(o.Key)
				if !ok {
					continue
				}
				// Points are ordered by their names alone.
				if name <= last && last != "" || !strings.HasPrefix(name, prefix) {
					yield(blob.Info{}, fmt.Errorf("list %s: the server lists %s after %s: not in byte order", prefix, name, last))
					return
				}
				last = name
				if o.Size == nil {
					yield(blob.Info{}, fmt.Errorf("list %s: the server does not tell the size of %s", prefix, name))
					return
				}
				if !yield(blob.Info{Name: name, Size: *o.Size}, nil) {
					return
				}
			}
		}
	}
}

// pages yields the answers to a listing; after an error nothing follows.
func (s *Store) pages(ctx context.Context, prefix string, delimiter *string) iter.Seq2[*s3.ListObjectsV2Output, error] {
	return func(yield func(*s3.ListObjectsV2Output, error) bool) {
		in := &s3.ListObjectsV2Input{Bucket: s.bucket(), Delimiter: delimiter, Prefix: aws.String(s.root() + prefix)}
		for {
			var page *s3.ListObjectsV2Output
			err := ctx.Err()
			if err == nil {
				err = s.retry(ctx, 0, func(ctx context.Context) (err error) {
					page, err = s.client.ListObjectsV2(ctx, in)
					return err
				})
			}
			if err != nil {
				yield(nil, fmt.Errorf("list %s: %w", prefix, err))
				return
			}
			if !yield(page, nil) || !aws.ToBool(page.IsTruncated) {
				return
			}
			if next := page.NextContinuationToken; next == nil || in.ContinuationToken != nil && *next == *in.ContinuationToken {
				yield(nil, fmt.Errorf("list %s: %w", prefix, errors.New("the server does not say how its listing goes on")))
				return
			}
			in.ContinuationToken = page.NextContinuationToken
		}
	}
}

// validPrefix tells whether any name can begin so.
func validPrefix(prefix string) bool {
	return prefix == "" || blob.ValidName(strings.TrimSuffix(prefix, "/"))
}

// ListDirs implements [blob.Store].
func (s *Store) ListDirs(ctx context.Context, prefix string) ([]string, error) {
	if prefix != "" && (!strings.HasSuffix(prefix, "/") || !validPrefix(prefix)) {
		return nil, fmt.Errorf("list %q: %w", prefix, blob.ErrName)
	}
	var dirs []string
	for page, err := range s.pages(ctx, prefix, aws.String("/")) {
		if err != nil {
			return nil, err
		}
		for _, p := range page.CommonPrefixes {
			dir, ok := strings.CutPrefix(aws.ToString(p.Prefix), s.root()+prefix)
			dir = strings.TrimSuffix(dir, "/")
			if ok && blob.ValidName(dir) {
				dirs = append(dirs, dir)
			}
		}
	}
	slices.Sort(dirs) // "a-" comes before "a/" and after "a"
	return slices.Compact(dirs), nil
}

// Delete implements [blob.Store]. In a bucket with versions the versions stay.
// Of concurrent deletes of one object more than one may succeed.
func (s *Store) Delete(ctx context.Context, name string) error {
	key, err := s.key(name)
	if err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	// S3 answers the same whether there was one or not.
	if _, err = s.head(ctx, key); err == nil {
		err = s.retry(ctx, 0, func(ctx context.Context) error {
			_, err := s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: s.bucket(), Key: key})
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}
