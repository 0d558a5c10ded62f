package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sync/semaphore"
)

// transmit serves requests until the client leaves (nil, or io.EOF if it did
// not say so), the server stops (errStopped), or something breaks.
// Section "Transmission".
func (c *conn) transmit(ctx context.Context) error {
	c.in.grow(inputBuffer)
	c.in.before = c.rest
	c.batch = make([]byte, 0, batchSize)
	c.inFlight = max(or(c.srv.MaxInFlight, DefaultMaxInFlight), c.srv.buffers.cost(maxPayload))
	c.budget = semaphore.NewWeighted(c.inFlight)
	length, decode := requestLength, decodeRequest
	if c.headers == extendedHeaders {
		length, decode = extendedRequestLength, decodeExtended
	}
	c.in.head = length
	for {
		c.in.next()
		p, err := c.in.peek(length)
		if err != nil {
			if c.stopping.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
				return errStopped // whatever was gathered was sent before that read
			}
			return err
		}
		c.in.begun()
		r, ok := decode(p)
		c.in.skip(length)
		if !ok {
			return errors.Join(fmt.Errorf("%w: bad request magic", ErrProtocol), c.flush())
		}
		if r.cmd == cmdDisconnect {
			return c.flush() // serve waits for the workers before it hangs up
		}
		if err := c.execute(ctx, r); err != nil {
			if c.stopping.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
				return errStopped // within a payload
			}
			return err
		}
	}
}

// execute answers one request or hands it to a worker. Its error ends the
// connection.
func (c *conn) execute(ctx context.Context, r request) error {
	if r.flags&cmdFlagPayloadLen != 0 && r.cmd != cmdWrite && c.headers == extendedHeaders {
		return c.executePayload(ctx, r)
	}
	if refusal, why := c.refusal(r); refusal != 0 {
		if c.hasPayload(r) {
			if c.headers == extendedHeaders && r.length > maxPayload {
				return errors.Join(fmt.Errorf("%w: payload of %d bytes", ErrProtocol, r.length), c.flush())
			}
			if err := c.in.drain(int64(r.length)); err != nil {
				return err
			}
		}
		return c.gather(r, refusal, why)
	}
	switch r.cmd {
	case cmdRead:
		return c.read(ctx, r)
	case cmdWrite:
		return c.write(ctx, r)
	case cmdFlush:
		return c.spill(ctx, 0, func(context.Context) error { return c.answer(r, c.sync(r)) })
	case cmdTrim:
		return c.spill(ctx, 0, func(context.Context) error { return c.answer(r, c.trim(r)) })
	case cmdWriteZeroes:
		return c.zero(ctx, r)
	case cmdCache:
		return c.spill(ctx, c.srv.buffers.cost(cachePiece), func(ctx context.Context) error { return c.answer(r, c.cache(ctx, r)) })
	default: // cmdBlockStatus: check let nothing else through
		return c.blockStatus(ctx, r, c.contexts)
	}
}

// hasPayload tells whether the client sends r.length bytes after r.
func (c *conn) hasPayload(r request) bool {
	return r.cmd == cmdWrite && (c.headers != extendedHeaders || r.has(cmdFlagPayloadLen))
}

// executePayload answers a request with a payload that is no write: of those only
// a block status may have one. Section "Request message" of extended headers.
func (c *conn) executePayload(ctx context.Context, r request) error {
	if r.length > maxPayload {
		return errors.Join(fmt.Errorf("%w: payload of %d bytes", ErrProtocol, r.length), c.flush())
	}
	if r.cmd != cmdBlockStatus || !c.validFilter(r.length) {
		if err := c.in.drain(int64(r.length)); err != nil {
			return err
		}
		return c.gather(r, EINVAL, "payload not valid for this command")
	}
	p, err := c.in.peek(int(r.length))
	if err != nil {
		return truncated(err)
	}
	effect, contexts, ok := c.filter(p)
	c.in.skip(int(r.length))
	if !ok {
		return c.gather(r, EINVAL, "metadata context unknown or named twice")
	}
	r.flags, r.length = r.flags&^cmdFlagPayloadLen, effect
	if refusal, why := c.refusal(r); refusal != 0 {
		return c.gather(r, refusal, why)
	}
	return c.blockStatus(ctx, r, contexts)
}

// refusal tells why a request is not executed, 0 if it is.
func (c *conn) refusal(r request) (Errno, string) {
	if c.stopping.Load() {
		return ESHUTDOWN, ""
	}
	return c.check(r)
}

// check tells what is wrong with a request as such, 0 if nothing. Sections
// "Request types", "Command flags" and "Error values".
func (c *conn) check(r request) (Errno, string) {
	flags, writes, known := c.allowed(r.cmd)
	if !known {
		return EINVAL, "unknown command"
	}
	if writes && c.writable == nil {
		return EPERM, "export is read-only"
	}
	if r.flags&^flags != 0 {
		return EINVAL, "flag not valid for this command"
	}
	if r.cmd == cmdWrite && c.headers == extendedHeaders && !r.has(cmdFlagPayloadLen) {
		return EINVAL, "a write without its payload"
	}
	if r.cmd == cmdFlush {
		if r.off != 0 || r.length != 0 {
			return EINVAL, "offset and length of a flush must be 0"
		}
		return 0, ""
	}
	if r.length > maxPayload && (r.cmd == cmdRead || r.cmd == cmdWrite || r.has(cmdFlagNoHole)) {
		// Other commands move no data: any length is as good as several.
		if c.headers == extendedHeaders && r.cmd == cmdWriteZeroes {
			return EOVERFLOW, "request is longer than the maximum payload"
		}
		return EINVAL, "request is longer than the maximum block size"
	}
	if size := uint64(c.size); r.off > size || r.length > size-r.off {
		if r.cmd == cmdWrite || r.cmd == cmdWriteZeroes {
			return ENOSPC, "request reaches behind the end of the export"
		}
		return EINVAL, "request reaches behind the end of the export"
	}
	if r.cmd == cmdBlockStatus {
		if len(c.contexts) == 0 {
			return EINVAL, "no metadata context was selected"
		}
		if r.length == 0 {
			return EINVAL, "length of a block status must not be 0"
		}
	}
	return 0, ""
}

// allowed tells which flags a command may carry and whether it changes the
// export. FUA is valid for all commands.
func (c *conn) allowed(cmd uint16) (flags uint16, writes, known bool) {
	switch cmd {
	case cmdRead:
		if c.headers.chunked() {
			return cmdFlagFUA | cmdFlagDF, false, true
		}
		return cmdFlagFUA, false, true
	case cmdWrite:
		if c.headers == extendedHeaders {
			return cmdFlagFUA | cmdFlagPayloadLen, true, true
		}
		return cmdFlagFUA, true, true
	case cmdTrim:
		return cmdFlagFUA, true, true
	case cmdFlush, cmdCache:
		return cmdFlagFUA, false, true
	case cmdWriteZeroes:
		return cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero, true, true
	case cmdBlockStatus:
		return cmdFlagFUA | cmdFlagReqOne, false, true
	}
	return 0, false, false
}

// appendReply appends a reply without data. A read must be answered by a
// structured reply where that was agreed; errors should, as they then say why.
func (c *conn) appendReply(p []byte, r request, e Errno, why string) []byte {
	switch {
	case !c.headers.chunked(), c.headers == structuredHeaders && e == 0 && r.cmd != cmdRead:
		return appendSimple(p, r.handle, e)
	case e == 0:
		return c.headers.appendChunk(p, replyFlagDone, replyNone, r, 0)
	}
	if why == "" {
		why = e.Error()
	}
	return c.headers.appendErrorChunk(p, r, e, why)
}

// gather queues a reply without data; for the connection's goroutine.
func (c *conn) gather(r request, e Errno, why string) error {
	if err := c.reserve(maxChunkLength + 128); err != nil {
		return err
	}
	c.batch = c.appendReply(c.batch, r, e, why)
	return nil
}

// answer sends a reply without data; for workers.
func (c *conn) answer(r request, e Errno) error {
	return c.out.send(c.appendReply(make([]byte, 0, 96), r, e, ""))
}

// readAt fills p from the disk.
func (c *conn) readAt(ctx context.Context, p []byte, off int64) error {
	var n int
	var err error
	if c.cancelable != nil {
		n, err = c.cancelable.ReadAtContext(ctx, p, off)
	} else {
		n, err = c.disk.ReadAt(p, off)
	}
	switch {
	case n == len(p):
		return nil // io.ReaderAt may add io.EOF
	case err == nil || errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF // check saw that it is within the disk
	}
	return err
}
