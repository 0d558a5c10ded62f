package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/logging"

	"github.com/tidemark/tidemark/store/blob"
)

// Bounds of uploads and requests.
const (
	defaultPartSize  = 16 << 20
	minPartSize      = 5 << 20 // S3's
	maxParts         = 10000   // S3's
	wholeParts       = 4       // an object of at most so many parts goes in one request
	partsAtOnce      = 3
	defaultRetryFor  = 2 * time.Minute
	firstRetryFor    = 10 * time.Second // until the server has answered once: more likely a wrong address
	defaultTimeout   = time.Minute      // of a request, beside the time for its bytes
	slowestTransfer  = 64 << 10         // bytes/s: what is slower counts as stuck
	connectTimeout   = 10 * time.Second
	connectionsAlive = 32
)

// Doer sends one request.
type Doer interface {
	Do(*http.Request) (*http.Response, error)
}

// Options say how to talk to the server. The zero value is right outside tests.
type Options struct {
	// PartSize is the length of a part of a multipart upload in bytes, at least 5 MiB; 0: 16 MiB.
	// Objects of more than 4 parts are uploaded so, 3 parts at a time.
	PartSize int64
	// RetryFor is how long a request is tried again after failures that may pass; 0: 2 minutes.
	RetryFor time.Duration
	// Timeout is how long one request may take beside the time for its bytes (64 KiB/s); 0: 1 minute.
	Timeout time.Duration
	// Wrap may put something between the Store and the network; nil: nothing.
	Wrap func(Doer) Doer
}

// Store keeps objects in a bucket, below a prefix. Memory: Put of anything
// but a *bytes.Reader holds the object, or 4 parts of it if it has more than 4.
type Store struct {
	client   *s3.Client
	where    Location
	partSize int64
	retryFor time.Duration
	timeout  time.Duration
	pause    time.Duration // before the first retry
	reached  atomic.Bool   // the server has answered
	idle     func()
}

var _ blob.Store = (*Store)(nil)

// Open prepares the use of l. It finds credentials, and sends nothing to the
// server itself.
func Open(ctx context.Context, l Location, o Options) (*Store, error) {
	if o.PartSize != 0 && o.PartSize < minPartSize {
		return nil, fmt.Errorf("parts of %d bytes, less than 5 MiB", o.PartSize)
	}
	cfg, err := load(ctx, l)
	if err != nil {
		return nil, err
	}
	var doer Doer = cfg.HTTPClient
	if o.Wrap != nil {
		doer = o.Wrap(doer)
	}
	client := s3.NewFromConfig(cfg, func(so *s3.Options) {
		so.HTTPClient = doer
		so.Retryer = aws.NopRetryer{} // see retry
		// Only what S3 demands: other servers refuse some of the rest. Uploads carry a checksum of
		// their own, and what is read is checked against its hash by package store.
		so.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		so.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
		so.DisableLogOutputChecksumValidationSkipped = true
		if l.Endpoint != "" {
			so.BaseEndpoint = aws.String(l.Endpoint)
		}
		so.UsePathStyle = l.Style == PathStyle || l.Style == "" && so.BaseEndpoint != nil
	})
	s := &Store{
		client: client, where: l,
		partSize: defaultPartSize, retryFor: defaultRetryFor, timeout: defaultTimeout, pause: firstPause,
	}
	if o.PartSize != 0 {
		s.partSize = o.PartSize
	}
	if o.RetryFor != 0 {
		s.retryFor = o.RetryFor
	}
	if o.Timeout != 0 {
		s.timeout = o.Timeout
	}
	if c, ok := cfg.HTTPClient.(*awshttp.BuildableClient); ok {
		s.idle = func() { c.GetTransport().CloseIdleConnections() }
	}
	return s, nil
}

// load reads what the environment and the files of the AWS tools say.
func load(ctx context.Context, l Location) (aws.Config, error) {
	transport := awshttp.NewBuildableClient().
		WithTransportOptions(func(t *http.Transport) {
			t.MaxIdleConnsPerHost = connectionsAlive
			t.TLSHandshakeTimeout = connectTimeout
		})
	transport.GetDialer().Timeout = connectTimeout
	opts := []func(*config.LoadOptions) error{config.WithHTTPClient(transport), config.WithLogger(logging.Nop{})} // what matters is in errors
	if l.Region != "" {
		opts = append(opts, config.WithRegion(l.Region))
	}
	if l.Profile != "" {
		opts = append(opts, config.WithSharedConfigProfile(l.Profile))
	}
	if l.CAFile != "" {
		pem, err := os.ReadFile(l.CAFile)
		if err != nil {
			return aws.Config{}, err
		}
		opts = append(opts, config.WithCustomCABundle(bytes.NewReader(pem)))
	}
	cfg, err := config.LoadDefaultConfig(ctx, opts...)
	if err != nil {
		return cfg, err
	}
	if err := credentials(ctx, cfg); err != nil {
		return cfg, err
	}
	if cfg.Region == "" {
		cfg.Region = "us-east-1" // what servers other than AWS expect, mostly
	}
	return cfg, nil
}

// credentials makes sure that there are some, which is easier to understand than the
// first request's failure.
func credentials(ctx context.Context, cfg aws.Config) error {
	if cfg.Credentials == nil {
		return errNoCredentials
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if _, err := cfg.Credentials.Retrieve(ctx); err != nil {
		return fmt.Errorf("%w (%w)", errNoCredentials, err)
	}
	return nil
}

var errNoCredentials = errors.New("no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")

// Location returns what s was opened by.
func (s *Store) Location() Location { return s.where }

// Close implements [blob.Store]. It closes idle connections.
func (s *Store) Close() error {
	if s.idle != nil {
		s.idle()
	}
	return nil
}

func (s *Store) bucket() *string { return aws.String(s.where.Bucket) }

// key turns an object's name into its key in the bucket.
func (s *Store) key(name string) (*string, error) {
	if !blob.ValidName(name) {
		return nil, fmt.Errorf("%w: %q", blob.ErrName, name)
	}
	key := s.root() + name
	if len(key) > 1024 {
		return nil, fmt.Errorf("%w: longer than 1024 bytes with its prefix: %q", blob.ErrName, name)
	}
	return &key, nil
}

// root is what all keys begin with.
func (s *Store) root() string {
	if s.where.Prefix == "" {
		return ""
	}
	return s.where.Prefix + "/"
}

// name is the inverse of key; ok tells whether there is one.
func (s *Store) name(key *string) (name string, ok bool) {
	name, ok = strings.CutPrefix(aws.ToString(key), s.root())
	return name, ok && blob.ValidName(name)
}

var errNoBucket = errors.New("the bucket does not exist (make it first: versioning and object lock are set when it is made)")
