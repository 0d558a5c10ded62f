package nbd

import (
	"context"
	"errors"
	"io"
)

const (
	// smallWrite is how much payload is waited for in the input buffer, and
	// written from there without a copy.
	smallWrite = 64 << 10
	// writeChunk is in what pieces longer payloads are written. No more memory
	// than that is used for any write.
	writeChunk = 256 << 10
	// writeAlign is where these pieces end, so that they cut no block of a disk.
	writeAlign = 64 << 10
)

// write executes NBD_CMD_WRITE: data goes to the disk as it comes. With FUA a
// worker makes it durable before the reply.
func (c *conn) write(ctx context.Context, r request) error {
	diskErr, err := c.writePayload(r)
	if err != nil {
		return err
	}
	if diskErr != nil {
		c.logDisk("write", r, diskErr)
		return c.gather(r, errnoOf(diskErr), "")
	}
	if r.has(cmdFlagFUA) {
		return c.spill(ctx, 0, func(context.Context) error { return c.answer(r, c.sync(r)) })
	}
	return c.gather(r, 0, "")
}

// writePayload takes exactly the payload from the input, whatever the disk says.
func (c *conn) writePayload(r request) (diskErr, err error) {
	off, n := int64(r.off), int(r.length)
	c.in.expect(n > smallWrite)
	if n <= smallWrite {
		if n == 0 {
			return nil, nil
		}
		p, err := c.in.peek(n)
		if err != nil {
			return nil, truncated(err)
		}
		_, diskErr = c.writable.WriteAt(p, off)
		c.in.skip(n)
		return diskErr, nil
	}
	return c.writeLarge(off, int64(n))
}

// writeLarge takes a payload in pieces. Where the disk lies in a file, the kernel
// moves it there.
func (c *conn) writeLarge(off, n int64) (diskErr, err error) {
	if c.landing != nil && c.unix != nil {
		if fd, at, ok := c.landing.WriteFile(off, n); ok {
			return c.writeSpliced(int(fd), at-off, off, n)
		}
	}
	return c.writePieces(off, n, nil)
}

// writePieces writes n bytes at off through a buffer. After an earlier error it
// only takes them.
func (c *conn) writePieces(off, n int64, before error) (diskErr, err error) {
	buf := c.srv.buffers.get(writeChunk)
	defer c.srv.buffers.put(buf)
	diskErr = before
	for n > 0 {
		p := buf.data[:min(n, writeChunk-off%writeAlign)]
		if err := c.in.readFull(p); err != nil {
			return nil, err
		}
		if diskErr == nil {
			_, diskErr = c.writable.WriteAt(p, off)
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return diskErr, nil
}

// writeSpliced has the kernel write n bytes at off of the disk, which are at off+shift
// of the file.
func (c *conn) writeSpliced(fd int, shift, off, n int64) (diskErr, err error) {
	// What was read ahead comes first, and ends where a page does.
	if ready := int64(c.in.w - c.in.r); ready > 0 {
		head := min(n, (off+ready+page-1)&^(page-1)-off)
		if diskErr, err := c.writePieces(off, head, nil); diskErr != nil || err != nil {
			if err != nil {
				return nil, err
			}
			return c.writePieces(off+head, n-head, diskErr)
		}
		off, n = off+head, n-head
	}
	if n == 0 {
		return nil, nil
	}
	if err := c.in.before(); err != nil {
		return nil, err
	}
	if c.splicer == nil {
		if c.splicer, err = newSplicer(); err != nil {
			return c.writePieces(off, n, nil) // out of descriptors, most likely
		}
	}
	at, left, err := c.splicer.move(c.unix, &c.in.progress, fd, off+shift, n)
	if err != nil {
		return nil, err
	}
	if c.splicer.held > 0 || left > 0 {
		return c.writeUnspliced(at-shift, left)
	}
	return nil, nil
}

// writeUnspliced writes what the file did not take from the pipe, and what is still
// to come: either works, or says what is wrong.
func (c *conn) writeUnspliced(off, left int64) (diskErr, err error) {
	buf := c.srv.buffers.get(writeChunk)
	defer c.srv.buffers.put(buf)
	for c.splicer.held > 0 {
		n, err := c.splicer.take(buf.data)
		if err != nil {
			return nil, err
		}
		if diskErr == nil {
			_, diskErr = c.writable.WriteAt(buf.data[:n], off)
		}
		off += int64(n)
	}
	return c.writePieces(off, left, diskErr)
}

func (c *conn) dropSplicer() {
	if c.splicer != nil {
		_ = c.splicer.Close() // what it may hold is nobody's any more
	}
}

// sync makes all writes answered so far durable, of all connections. It is
// called after the request has come, so by the contract of WritableDisk it
// covers every write that had returned by then.
func (c *conn) sync(r request) Errno {
	if c.writable == nil {
		return 0
	}
	if err := c.writable.Sync(); err != nil {
		c.logDisk("flush", r, err)
		return errnoOf(err)
	}
	return 0
}

// trim executes NBD_CMD_TRIM.
func (c *conn) trim(r request) Errno {
	if r.length > 0 {
		if err := c.writable.Trim(int64(r.off), int64(r.length)); err != nil {
			c.logDisk("trim", r, err)
			return errnoOf(err)
		}
	}
	if r.has(cmdFlagFUA) {
		return c.sync(r)
	}
	return 0
}

// zero executes NBD_CMD_WRITE_ZEROES.
func (c *conn) zero(ctx context.Context, r request) error {
	var memory int64
	if r.has(cmdFlagNoHole) {
		memory = c.srv.buffers.cost(writeChunk)
	}
	return c.spill(ctx, memory, func(ctx context.Context) error { return c.answer(r, c.writeZeroes(ctx, r)) })
}

func (c *conn) writeZeroes(ctx context.Context, r request) Errno {
	off, n := int64(r.off), int64(r.length)
	if r.has(cmdFlagFastZero) && n > 0 {
		switch {
		case !r.has(cmdFlagNoHole) && c.isZero(ctx, off, n):
			n = 0 // nothing to do
		case r.has(cmdFlagNoHole) || !c.zeroIsFast(off, n):
			return ENOTSUP
		}
	}
	var err error
	switch {
	case n == 0:
	case r.has(cmdFlagNoHole):
		err = c.provision(off, n)
	default:
		err = c.writable.Zero(off, n)
	}
	if err != nil {
		c.logDisk("write zeroes", r, err)
		return errnoOf(err)
	}
	if r.has(cmdFlagFUA) {
		return c.sync(r)
	}
	return 0
}

// provision writes zeroes as data: Zero would give the space back.
func (c *conn) provision(off, n int64) error {
	buf := c.srv.buffers.get(writeChunk)
	defer c.srv.buffers.put(buf)
	clear(buf.data)
	for n > 0 {
		p := buf.data[:min(n, writeChunk-off%writeAlign)]
		if _, err := c.writable.WriteAt(p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

func (c *conn) zeroIsFast(off, n int64) bool {
	f, ok := c.disk.(FastZeroer)
	return ok && f.ZeroIsFast(off, n)
}

// isZero tells whether the disk's map says that there is nothing in
// [off, off+n). It gives up early: the question must be cheap.
func (c *conn) isZero(ctx context.Context, off, n int64) bool {
	const patience = 1024
	looked := 0
	for e, err := range c.disk.Extents(ctx, off, n) {
		if looked++; err != nil || !e.Zero || looked > patience {
			return false
		}
	}
	return true
}

// truncated turns the end of the stream within a payload into an error.
func truncated(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
