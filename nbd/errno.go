package nbd

import (
	"context"
	"errors"
	"io/fs"
	"syscall"
)

// Errno is an error value of the protocol, section "Error values".
type Errno uint32

// The error values that the protocol knows. Zero is success.
const (
	EPERM     Errno = 1   // writing to a read-only export
	EIO       Errno = 5   // the disk failed
	ENOMEM    Errno = 12  // not sent by this server
	EINVAL    Errno = 22  // a bad request
	ENOSPC    Errno = 28  // no room, or a write behind the end
	EOVERFLOW Errno = 75  // an unfragmented read is too large
	ENOTSUP   Errno = 95  // a fast zero would not be fast
	ESHUTDOWN Errno = 108 // the server is stopping
)

func (e Errno) Error() string {
	switch e {
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case ENOMEM:
		return "out of memory"
	case EINVAL:
		return "invalid request"
	case ENOSPC:
		return "no space left on device"
	case EOVERFLOW:
		return "value too large"
	case ENOTSUP:
		return "operation not supported"
	case ESHUTDOWN:
		return "server is shutting down"
	}
	return "unknown error"
}

// errnoOf chooses the protocol's word for an error of a disk. What the error
// says is for the log: it may name files that a client has no business to know.
func errnoOf(err error) Errno {
	var e Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return ENOSPC
	case errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission):
		return EPERM
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return ESHUTDOWN
	}
	return EIO
}
