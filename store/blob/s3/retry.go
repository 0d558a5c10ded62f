package s3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"time"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/tidemark/tidemark/store/blob"
)

const (
	firstPause = 100 * time.Millisecond
	longPause  = 10 * time.Second
)

// errTorn marks answers that ended early. Deliberately not io.EOF or
// io.ErrUnexpectedEOF, which would say something about the object.
var errTorn = errors.New("the answer ended early")

// errTaken is what a condition of a write failed with: the key exists.
var errTaken = errors.New("the key exists")

// retry calls try until it succeeds, fails for good, or has failed for too long.
// Each call may take the Store's timeout and the time for size bytes.
func (s *Store) retry(ctx context.Context, size int64, try func(ctx context.Context) error) error {
	began := time.Now()
	pause := s.pause
	for n := 1; ; n++ {
		limited, cancel := context.WithTimeout(ctx, s.timeout+time.Duration(size/slowestTransfer)*time.Second)
		err := try(limited)
		cancel()
		if err == nil {
			s.reached.Store(true)
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w (%w)", ctx.Err(), plain(err))
		}
		if answered(err) {
			s.reached.Store(true)
		}
		if !passing(err) {
			return plain(err)
		}
		budget := s.retryFor
		if !s.reached.Load() {
			budget = min(budget, firstRetryFor)
		}
		wait := pause/2 + rand.N(pause)
		if spent := time.Since(began); spent+wait > budget {
			return fmt.Errorf("%w (tried %d times in %s)", plain(err), n, spent.Round(time.Millisecond))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", ctx.Err(), plain(err))
		case <-time.After(wait):
		}
		pause = min(2*pause, longPause)
	}
}

// answered tells whether err is the server's word.
func answered(err error) bool { return status(err) != 0 }

// status is the answer's HTTP status, or 0.
func status(err error) int {
	var re *awshttp.ResponseError
	if errors.As(err, &re) && re.Response != nil && re.Response.Response != nil {
		return re.HTTPStatusCode()
	}
	return 0
}

func code(err error) string {
	var ae smithy.APIError
	if errors.As(err, &ae) {
		return ae.ErrorCode()
	}
	return ""
}

// passing tells whether the same request may do better later.
func passing(err error) bool {
	if errors.Is(err, errTorn) {
		return true
	}
	switch code(err) {
	case "SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException", "RequestLimitExceeded",
		"InternalError", "ServiceUnavailable", "ExpiredToken", "ConditionalRequestConflict", "OperationAborted", "BadDigest", "IncompleteBody":
		return true
	}
	switch st := status(err); {
	case st == http.StatusNotImplemented:
		return false
	case st >= 500, st == http.StatusTooManyRequests, st == http.StatusRequestTimeout:
		return true
	case st >= 300:
		return false
	}
	// No answer, or one that can't be understood.
	var (
		name   *net.DNSError
		cert   *tls.CertificateVerificationError
		scheme tls.RecordHeaderError
		asked  *blobError
	)
	switch {
	case errors.As(err, &name):
		return !name.IsNotFound
	case errors.As(err, &cert), errors.As(err, &scheme), errors.As(err, &asked):
		return false
	}
	return true
}

// blobError carries what the caller must see as it is.
type blobError struct{ error }

func (e *blobError) Unwrap() error { return e.error }

// plain makes a failed request's error fit to be seen by a caller: in few words, with this package's and package
// blob's errors, and without those that would say something about the
// object's end or the caller's context.
func plain(err error) error {
	var asked *blobError
	if errors.As(err, &asked) {
		return asked.error
	}
	st, c := status(err), code(err)
	switch {
	case c == "NoSuchBucket":
		return errNoBucket
	case st == http.StatusNotFound:
		return fmt.Errorf("%w (%s)", blob.ErrNotFound, describe(err))
	case st == http.StatusPreconditionFailed:
		return fmt.Errorf("%w (%s)", errTaken, describe(err))
	case st != 0:
		return errors.New(describe(err))
	}
	for _, hide := range []error{io.EOF, io.ErrUnexpectedEOF, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, hide) {
			return errors.New(describe(err))
		}
	}
	var unsent *smithyhttp.RequestSendError
	if errors.As(err, &unsent) {
		return unsent.Err
	}
	return err
}

func describe(err error) string {
	var ae smithy.APIError
	var unsent *smithyhttp.RequestSendError
	switch {
	case errors.As(err, &unsent):
		return unsent.Err.Error()
	case !errors.As(err, &ae):
		return err.Error()
	}
	return fmt.Sprintf("HTTP %d %s: %s", status(err), ae.ErrorCode(), ae.ErrorMessage())
}
