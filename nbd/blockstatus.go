package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"iter"
)

// maxExtents is how many descriptors one chunk of a reply carries; a client asks
// again for the rest.
const maxExtents = 2048

// extentMemory is what a descriptor takes until it is sent, in bytes.
const extentMemory = 64

// statusRun is a run of bytes of one status in some metadata context.
type statusRun struct {
	off, n int64
	status uint32
}

// blockStatus executes NBD_CMD_BLOCK_STATUS for some of the selected contexts:
// one chunk for each.
func (c *conn) blockStatus(ctx context.Context, r request, contexts []*statusContext) error {
	return c.spill(ctx, int64(len(contexts))*maxExtents*extentMemory, func(ctx context.Context) error {
		for i, s := range contexts {
			limit := maxExtents
			if r.has(cmdFlagReqOne) {
				limit = 1
			}
			list, err := collect(s.runs(ctx, int64(r.off), int64(r.length)), int64(r.off), int64(r.length), limit)
			if err != nil {
				c.logDisk("block status", r, err)
				return c.answer(r, errnoOf(err))
			}
			var flags uint16
			if i == len(contexts)-1 {
				flags = replyFlagDone
			}
			if err := c.out.send(c.headers.appendStatus(flags, r, s.id, list)); err != nil {
				return err
			}
		}
		return nil
	})
}

// appendStatus returns a BLOCK_STATUS chunk, or one of BLOCK_STATUS_EXT.
func (h headers) appendStatus(flags uint16, r request, id uint32, list []statusRun) []byte {
	if h == extendedHeaders {
		n := 8 + 16*len(list)
		b := h.appendChunk(make([]byte, 0, maxChunkLength+n), flags, replyBlockStatusExt, r, uint32(n))
		b = binary.BigEndian.AppendUint32(b, id)
		b = binary.BigEndian.AppendUint32(b, uint32(len(list)))
		for _, e := range list {
			b = binary.BigEndian.AppendUint64(b, uint64(e.n))
			b = binary.BigEndian.AppendUint64(b, uint64(e.status))
		}
		return b
	}
	n := 4 + 8*len(list)
	b := h.appendChunk(make([]byte, 0, maxChunkLength+n), flags, replyBlockStatus, r, uint32(n))
	b = binary.BigEndian.AppendUint32(b, id)
	for _, e := range list {
		b = binary.BigEndian.AppendUint32(b, uint32(e.n)) // at most the request's length
		b = binary.BigEndian.AppendUint32(b, e.status)
	}
	return b
}

// validFilter tells whether a payload of n bytes may name contexts. Section
// "NBD_CMD_BLOCK_STATUS" of extended headers.
func (c *conn) validFilter(n uint64) bool {
	return n >= 8+4 && n%4 == 0 && n <= 8+4*uint64(len(c.contexts))
}

// filter reads a payload of valid length: the effect length, and the IDs of those
// contexts that are asked for. Unknown ones and repetitions are an error.
func (c *conn) filter(p []byte) (effect uint64, contexts []*statusContext, ok bool) {
	effect = binary.BigEndian.Uint64(p)
	var seen [maxContexts + 1]bool
	for p = p[8:]; len(p) > 0; p = p[4:] {
		id := binary.BigEndian.Uint32(p)
		if id < 1 || int64(id) > int64(len(c.contexts)) || seen[id] {
			return 0, nil, false
		}
		seen[id] = true
		contexts = append(contexts, c.contexts[id-1])
	}
	return effect, contexts, true
}

var errBadRuns = errors.New("disk lists its extents wrongly")

// collect merges ascending runs within [off, off+n) into at most limit ones that
// begin at off. What lies in no run has status 0.
func collect(runs iter.Seq2[statusRun, error], off, n int64, limit int) ([]statusRun, error) {
	var list []statusRun
	at, end := off, off+n
	add := func(to int64, status uint32) bool {
		switch k := len(list) - 1; {
		case to == at:
		case k >= 0 && list[k].status == status:
			list[k].n += to - at
		case len(list) == limit:
			return false
		default:
			list = append(list, statusRun{at, to - at, status})
		}
		at = to
		return true
	}
	for r, err := range runs {
		if err != nil {
			return nil, err
		}
		if r.off < at || r.n <= 0 || r.n > end-r.off {
			return nil, errBadRuns
		}
		if !add(r.off, 0) || !add(r.off+r.n, r.status) {
			return list, nil
		}
	}
	add(end, 0)
	return list, nil
}
