package nbd

import (
	"context"
	"encoding/binary"
)

// maxExtents is how many descriptors one reply carries; a client asks again
// for the rest.
const maxExtents = 2048

// blockStatus executes NBD_CMD_BLOCK_STATUS for base:allocation.
func (c *conn) blockStatus(ctx context.Context, r request) error {
	limit := maxExtents
	if r.has(cmdFlagReqOne) {
		limit = 1
	}
	list, err := c.extents(ctx, int64(r.off), int64(r.length), limit)
	if err != nil {
		c.logDisk("block status", r, err)
		return c.answer(r, errnoOf(err))
	}
	b := make([]byte, 0, chunkLength+4+8*len(list))
	b = appendChunk(b, replyFlagDone, replyBlockStatus, r.handle, uint32(4+8*len(list)))
	b = binary.BigEndian.AppendUint32(b, contextAllocationID)
	for _, e := range list {
		var state uint32
		if e.zero {
			state = stateHole | stateZero
		}
		b = binary.BigEndian.AppendUint32(b, uint32(e.n))
		b = binary.BigEndian.AppendUint32(b, state)
	}
	return c.out.send(b)
}

// extents merges the disk's extents into at most limit runs from off on.
func (c *conn) extents(ctx context.Context, off, n int64, limit int) ([]run, error) {
	var list []run
	at, end := off, off+n
	for e, err := range c.disk.Extents(ctx, off, n) {
		if err != nil {
			return nil, err
		}
		if e.Off != at || e.Len <= 0 || e.Len > end-at {
			break // a disk that breaks its word: the rest is data, which is always true
		}
		if k := len(list) - 1; k >= 0 && list[k].zero == e.Zero {
			list[k].n += e.Len
		} else {
			if len(list) == limit {
				return list, nil
			}
			list = append(list, run{at, e.Len, e.Zero})
		}
		at += e.Len
	}
	if at < end {
		if k := len(list) - 1; k >= 0 && !list[k].zero {
			list[k].n += end - at
		} else if len(list) < limit {
			list = append(list, run{at, end - at, false})
		}
	}
	return list, nil
}
