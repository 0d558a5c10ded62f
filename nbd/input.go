package nbd

import (
	"errors"
	"io"
)

// input is the receiving side of a connection. One goroutine uses it.
type input struct {
	progress
	from io.Reader
	buf  []byte
	r, w int  // buf[r:w] has come and was not used yet
	head int  // length of a request's head
	bulk bool // the last request carried a large payload; see expect

	// before is called before every read that may block: the moment to send
	// the replies gathered so far.
	before func() error
}

// maxEmpty is how many reads in a row may return nothing.
const maxEmpty = 100

var errNoProgress = errors.New("connection delivers nothing")

// grow replaces the buffer by one of size bytes.
func (in *input) grow(size int) {
	buf := make([]byte, max(size, in.w-in.r))
	in.w = copy(buf, in.buf[in.r:in.w])
	in.r, in.buf = 0, buf
}

// peek waits for n bytes and shows them; n is at most the size of the buffer.
// They stay until skip, and the slice is valid until the next call. The error
// is io.EOF if the peer ended before the first byte, io.ErrUnexpectedEOF if in
// between.
func (in *input) peek(n int) ([]byte, error) {
	for in.w-in.r < n {
		if in.r > 0 && in.r+n > len(in.buf) {
			in.w = copy(in.buf, in.buf[in.r:in.w])
			in.r = 0
		}
		if err := in.fill(); err != nil {
			if errors.Is(err, io.EOF) && in.w > in.r {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return in.buf[in.r : in.r+n], nil
}

// skip forgets n bytes that peek has shown.
func (in *input) skip(n int) {
	in.r += n
	if in.r == in.w {
		in.r, in.w = 0, 0
	}
}

// some waits for at least one byte and shows up to n of what is there.
func (in *input) some(n int) ([]byte, error) {
	if _, err := in.peek(1); err != nil {
		return nil, err
	}
	return in.buf[in.r : in.r+min(n, in.w-in.r)], nil
}

func (in *input) fill() error {
	if err := in.before(); err != nil {
		return err
	}
	in.waits(in.w > in.r)
	for range maxEmpty {
		n, err := in.from.Read(in.buf[in.w : in.w+in.ahead()])
		in.got(n)
		in.w += n
		if n > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return errNoProgress
}

// expect tells whether payloads are large at the moment. Then no more than the
// head of a request is read at once, so that its payload goes where it belongs
// instead of through the buffer.
func (in *input) expect(bulk bool) { in.bulk = bulk }

func (in *input) ahead() int {
	free := len(in.buf) - in.w
	if in.bulk && in.w-in.r < in.head {
		return min(free, in.head-(in.w-in.r))
	}
	return free
}

// readFull fills p, past the buffer where it can: large payloads are copied
// once.
func (in *input) readFull(p []byte) error {
	n := copy(p, in.buf[in.r:in.w])
	in.skip(n)
	if n == len(p) {
		return nil
	}
	if err := in.before(); err != nil {
		return err
	}
	for empty := 0; n < len(p); empty++ {
		in.waits(true)
		k, err := in.from.Read(p[n:])
		in.got(k)
		switch n += k; {
		case k > 0:
			empty = 0
		case errors.Is(err, io.EOF):
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case empty >= maxEmpty:
			return errNoProgress
		}
	}
	return nil
}

// drain throws n bytes away.
func (in *input) drain(n int64) error {
	in.expect(false) // a payload is no head
	for n > 0 {
		p, err := in.some(int(min(n, int64(len(in.buf)))))
		if err != nil {
			return err
		}
		in.skip(len(p))
		n -= int64(len(p))
	}
	return nil
}
