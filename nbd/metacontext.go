package nbd

import (
	"context"
	"encoding/binary"
)

// The only metadata context. Section "The base: metadata namespace".
const (
	contextAllocation   = "base:allocation"
	contextBase         = "base:"
	contextAllocationID = 1
)

// metaContext answers NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT.
func (n *negotiation) metaContext(ctx context.Context, option uint32, data []byte) {
	if option == optSetMetaContext {
		n.metaSet = false // a failed selection clears the last one too
	}
	if !n.structured {
		n.refuse(option, repErrInvalid, "structured replies come first")
		return
	}
	name, queries, ok := parseMetaContext(data)
	if !ok || !validString(name) {
		n.refuse(option, repErrInvalid, "malformed option")
		return
	}
	e, err := open(ctx, n.srv.Exports, n.client, name)
	if err != nil {
		n.refuseOpen(option, err)
		return
	}
	e.release()

	// Without a query a listing shows everything and a selection takes nothing.
	found := option == optListMetaContext && len(queries) == 0
	for _, q := range queries {
		// Other names and name spaces MUST be ignored.
		found = found || q == contextAllocation || q == contextBase && option == optListMetaContext
	}
	if found {
		var id uint32 // reserved in a listing
		if option == optSetMetaContext {
			id = contextAllocationID
			n.metaFor, n.metaSet = e.Name, true
		}
		n.reply(option, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), contextAllocation...))
	}
	n.reply(option, repAck, nil)
}

// parseMetaContext decodes the data of both options: the export and the queries.
func parseMetaContext(p []byte) (name string, queries []string, ok bool) {
	name, p, ok = cutString(p)
	if !ok || len(p) < 4 {
		return "", nil, false
	}
	count := binary.BigEndian.Uint32(p)
	p = p[4:]
	for ; count > 0; count-- { // ends by itself: every query takes 4 bytes of p
		var q string
		if q, p, ok = cutString(p); !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(p) == 0
}
