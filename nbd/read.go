package nbd

import (
	"context"
	"fmt"
	"time"
)

const (
	// largeRead is from where on a read is worth a system call of its own, or
	// a worker.
	largeRead = 64 << 10

	// holeMin is the shortest run of zeroes in a large read that is sent as a
	// hole, and maxChunks how many chunks such a read may be cut into.
	holeMin   = 32 << 10
	maxChunks = 64

	// dataPiece is how much data one chunk from a buffer carries.
	dataPiece = 1 << 20

	// slowRead is the mean time of small reads from which on they go to
	// workers. Handing over costs some 10 µs.
	slowRead = 200 * time.Microsecond

	cachePiece = 256 << 10
)

// read executes NBD_CMD_READ. The connection's goroutine does it itself if that
// is quick: what is small and lately came fast, and large parts of a file.
func (c *conn) read(ctx context.Context, r request) error {
	n := int64(r.length)
	c.in.expect(false)
	if n < largeRead {
		if mean := c.readCost.Load(); mean < int64(slowRead) {
			start := time.Now()
			err := c.readSmall(ctx, r)
			c.noteCost(time.Since(start))
			return err
		}
		return c.spill(ctx, c.srv.buffers.cost(offsetChunkLength+int(n)), func(ctx context.Context) error {
			start := time.Now()
			defer func() { c.noteCost(time.Since(start)) }()
			return c.readPiece(ctx, r, int64(r.off), n, true)
		})
	}
	if c.inFile(int64(r.off), n) {
		if err := c.flush(); err != nil {
			return err
		}
		return c.readLarge(ctx, r)
	}
	piece := n
	if c.fragments(r) {
		piece = min(n, dataPiece)
	}
	return c.spill(ctx, c.srv.buffers.cost(offsetChunkLength+int(piece)), func(ctx context.Context) error {
		return c.readLarge(ctx, r)
	})
}

// noteCost feeds the moving mean. Updates of workers may get lost, which a mean
// can bear.
func (c *conn) noteCost(d time.Duration) {
	mean := c.readCost.Load()
	c.readCost.Store(mean + (int64(d)-mean)/8)
}

func (c *conn) inFile(off, n int64) bool {
	if c.filer == nil || n == 0 {
		return false
	}
	_, ok := c.filer.File(off, n)
	return ok
}

// fragments tells whether the reply may consist of several chunks.
func (c *conn) fragments(r request) bool { return c.headers.chunked() && !r.has(cmdFlagDF) }

// appendData appends the head of a reply of n bytes at off that were read already.
func (c *conn) appendData(p []byte, r request, off, n int64, last bool) []byte {
	if !c.headers.chunked() {
		return appendSimple(p, r.handle, 0)
	}
	var flags uint16
	if last {
		flags = replyFlagDone
	}
	return c.headers.appendDataChunk(p, flags, r, uint64(off), uint32(n))
}

// readSmall reads into the batch of replies, without a copy.
func (c *conn) readSmall(ctx context.Context, r request) error {
	n := int(r.length)
	if n == 0 {
		return c.gather(r, 0, "")
	}
	if err := c.reserve(offsetChunkLength + n); err != nil {
		return err
	}
	b := c.appendData(c.batch, r, int64(r.off), int64(n), true)
	b = b[:len(b)+n]
	if err := c.readAt(ctx, b[len(b)-n:], int64(r.off)); err != nil {
		c.logDisk("read", r, err)
		return c.gather(r, errnoOf(err), "") // over the head of the success
	}
	c.batch = b
	return nil
}

// readLarge sends the answer of a large read, in chunks where that is allowed:
// holes as such, data by sendfile where it lies in a file.
func (c *conn) readLarge(ctx context.Context, r request) error {
	off, n := int64(r.off), int64(r.length)
	// Looking for a file's holes may take longer than sending zeroes: tmpfs looks at every
	// page up to the next one.
	if !c.fragments(r) || c.inFile(off, n) {
		_, err := c.readRun(ctx, r, off, n, true)
		return err
	}
	for _, run := range c.runs(ctx, off, n) {
		last := run.off+run.n == off+n
		if run.zero {
			var flags uint16
			if last {
				flags = replyFlagDone
			}
			if err := c.out.send(c.headers.appendHoleChunk(make([]byte, 0, holeChunkLength), flags, r, uint64(run.off), uint32(run.n))); err != nil {
				return err
			}
			continue
		}
		if more, err := c.readRun(ctx, r, run.off, run.n, last); err != nil || !more {
			return err
		}
	}
	return nil
}

// run is a part of a read.
type run struct {
	off, n int64
	zero   bool
}

// runs cuts a read at its holes. It is cautious: what it cannot tell is data.
func (c *conn) runs(ctx context.Context, off, n int64) []run {
	extents, err := c.extents(ctx, off, n, maxChunks)
	if err != nil {
		return []run{{off, n, false}} // if it matters, reading will say so
	}
	list := extents[:0]
	at, end := off, off+n
	for _, e := range extents {
		e.zero = e.zero && e.n >= holeMin
		if k := len(list) - 1; k >= 0 && list[k].zero == e.zero {
			list[k].n += e.n
		} else {
			list = append(list, e)
		}
		at = e.off + e.n
	}
	if at < end { // more than maxChunks
		list = append(list, run{at, end - at, false})
	}
	return list
}

// readRun sends the data of [off, off+n). more is false if the reply has ended,
// with an error that the client was told.
func (c *conn) readRun(ctx context.Context, r request, off, n int64, last bool) (more bool, err error) {
	if n >= largeRead && c.filer != nil {
		if fd, ok := c.filer.File(off, n); ok {
			return c.readFile(ctx, r, fd, off, n, last)
		}
	}
	if !c.fragments(r) {
		return false, c.readPiece(ctx, r, off, n, true)
	}
	for n > 0 {
		piece := min(n, dataPiece)
		ok, err := c.readChunk(ctx, r, off, piece, last && piece == n)
		if err != nil || !ok {
			return false, err
		}
		off, n = off+piece, n-piece
	}
	return true, nil
}

// readPiece sends the data of [off, off+n) from a buffer in one piece.
func (c *conn) readPiece(ctx context.Context, r request, off, n int64, last bool) error {
	_, err := c.readChunk(ctx, r, off, n, last)
	return err
}

func (c *conn) readChunk(ctx context.Context, r request, off, n int64, last bool) (ok bool, err error) {
	if n == 0 {
		return true, c.answer(r, 0)
	}
	buf := c.srv.buffers.get(offsetChunkLength + int(n))
	defer c.srv.buffers.put(buf)
	head := c.appendData(buf.data[:0], r, off, n, last)
	whole := buf.data[:len(head)+int(n)]
	if err := c.readAt(ctx, whole[len(head):], off); err != nil {
		c.logDisk("read", r, err)
		return false, c.answer(r, errnoOf(err))
	}
	return true, c.out.send(whole)
}

// readFile sends the data of [off, off+n) straight from a file. The success is
// told before the last byte was read, so if the file fails half-way what is left
// comes from ReadAt, and if that fails too: a structured reply is filled up with
// zeroes and then errs, a simple one ends the connection.
func (c *conn) readFile(ctx context.Context, r request, fd uintptr, off, n int64, last bool) (more bool, err error) {
	var space [offsetChunkLength]byte
	head := c.appendData(space[:0], r, off, n, false)

	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if err := c.out.sendLocked(head); err != nil {
		return false, err
	}
	sent, err := c.out.sendFileLocked(fd, off, n)
	if err != nil {
		return false, err
	}
	var failed error
	if sent < n {
		if failed, err = c.copyLocked(ctx, off+sent, n-sent); err != nil {
			return false, err
		}
	}
	switch {
	case failed != nil:
		c.logDisk("read", r, failed)
		return false, c.out.sendLocked(c.appendReply(nil, r, errnoOf(failed), ""))
	case last && c.headers.chunked():
		return true, c.out.sendLocked(c.headers.appendChunk(nil, replyFlagDone, replyNone, r, 0))
	}
	return true, nil
}

// copyLocked sends n bytes at off with ReadAt after sendfile gave up. failed is
// the disk's error, after which zeroes were sent.
func (c *conn) copyLocked(ctx context.Context, off, n int64) (failed, err error) {
	buf := c.srv.buffers.get(minBuffer)
	defer c.srv.buffers.put(buf)
	for n > 0 {
		p := buf.data[:min(n, minBuffer)]
		if failed == nil {
			failed = c.readAt(ctx, p, off)
		}
		if failed != nil {
			if !c.headers.chunked() {
				c.out.err = fmt.Errorf("read after the reply began: %w", failed)
				return failed, c.out.check()
			}
			clear(p)
		}
		if err := c.out.sendLocked(p); err != nil {
			return failed, err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return failed, nil
}

// cache executes NBD_CMD_CACHE: it reads, so that a disk with a cache has it
// warm. Of a long range only the beginning: it is a hint.
func (c *conn) cache(ctx context.Context, r request) Errno {
	off, n := int64(r.off), min(int64(r.length), maxPayload)
	if n == 0 || c.inFile(off, n) {
		return 0 // the kernel's cache needs no help from here
	}
	buf := c.srv.buffers.get(cachePiece)
	defer c.srv.buffers.put(buf)
	for n > 0 {
		p := buf.data[:min(n, cachePiece)]
		if err := c.readAt(ctx, p, off); err != nil {
			c.logDisk("cache", r, err)
			return errnoOf(err)
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return 0
}

// extents merges the disk's extents into at most limit runs from off on.
func (c *conn) extents(ctx context.Context, off, n int64, limit int) ([]run, error) {
	list, err := collect(allocation(ctx, c.disk, off, n), off, n, limit)
	runs := make([]run, len(list))
	for i, e := range list {
		runs[i] = run{e.off, e.n, e.status != 0}
	}
	return runs, err
}
