package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/tidemark/tidemark/restore"
)

const (
	// maxOption is the longest option that is read: the longest name and some
	// dozen queries of the longest kind. Nothing is allocated by a length that
	// a client only claims.
	maxOption = 64 << 10
	// maxOptionSkip is the longest option that is skipped; a client that
	// announces more is hung up on.
	maxOptionSkip = 1 << 20

	// maxPayload is the longest read or write in bytes, the limit that clients
	// may rely on, section "Block size constraints".
	maxPayload = 32 << 20

	preferredWritable = 4 << 10  // what copy-on-write works in
	preferredReadOnly = 64 << 10 // what a restore point is stored in
)

// handshake runs the fixed newstyle negotiation. It returns true when the
// client has chosen an export, false when it has left in good order.
// Section "Fixed newstyle negotiation".
func (c *conn) handshake(ctx context.Context) (bool, error) {
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	c.batch = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)

	p, err := c.in.peek(clientHelloLength)
	if err != nil {
		return false, err
	}
	flags := binary.BigEndian.Uint32(p)
	c.in.skip(clientHelloLength)
	if flags&^(clientFixed|clientNoZeroes) != 0 {
		return false, fmt.Errorf("%w: unknown client flags %#x", ErrProtocol, flags)
	}
	n := negotiation{conn: c, noZeroes: flags&clientNoZeroes != 0}
	defer n.forgetContexts()
	for {
		p, err := c.in.peek(optionHeaderLength)
		if err != nil {
			return false, err
		}
		magic, option, length := binary.BigEndian.Uint64(p), binary.BigEndian.Uint32(p[8:]), binary.BigEndian.Uint32(p[12:])
		c.in.skip(optionHeaderLength)
		if magic != magicOption {
			return false, fmt.Errorf("%w: option magic %#x", ErrProtocol, magic)
		}
		if flags&clientFixed == 0 && option != optExportName {
			return false, fmt.Errorf("%w: option %d without fixed newstyle", ErrProtocol, option)
		}
		done, err := n.option(ctx, option, length)
		if err != nil || done == left {
			return false, errors.Join(err, c.flush())
		}
		if done == chosen {
			return true, c.flush()
		}
		if err := c.flush(); err != nil {
			return false, err
		}
	}
}

// outcome is what an option leads to.
type outcome int

const (
	haggling outcome = iota // more options follow
	chosen                  // transmission begins
	left                    // the client has gone
)

// negotiation is the state of the option haggling.
type negotiation struct {
	*conn
	noZeroes bool
	selected selection // of metadata contexts
}

// option reads and answers one option. Section "Option types".
func (n *negotiation) option(ctx context.Context, option, length uint32) (outcome, error) {
	if n.needsTLS(option) && option == optExportName {
		return haggling, ErrTLSRequired
	}
	if length > maxOption {
		if length > maxOptionSkip || option == optExportName {
			return haggling, fmt.Errorf("%w: option %d of %d bytes", ErrProtocol, option, length)
		}
		if err := n.in.drain(int64(length)); err != nil {
			return haggling, err
		}
		switch {
		case option == optAbort:
			n.reply(option, repAck, nil)
			return left, nil
		case n.needsTLS(option):
			n.refuseWithoutTLS(option)
		case !knownOption(option):
			n.reply(option, repErrUnsupported, nil)
		default:
			n.refuse(option, repErrTooBig, "option is too long")
		}
		return haggling, nil
	}
	// The buffer grows with what has come, not with what was announced.
	data := make([]byte, 0, min(length, handshakeBuffer))
	for uint32(len(data)) < length {
		p, err := n.in.some(int(length) - len(data))
		if err != nil {
			return haggling, err
		}
		data = append(data, p...)
		n.in.skip(len(p))
	}
	if n.needsTLS(option) {
		n.refuseWithoutTLS(option)
		return haggling, nil
	}

	if n.stopping.Load() && option != optAbort {
		if option == optExportName {
			return haggling, errStopped
		}
		n.refuse(option, repErrShutdown, "server is shutting down")
		return haggling, nil
	}
	switch option {
	case optExportName:
		return n.exportName(ctx, string(data))
	case optInfo, optGo:
		return n.info(ctx, option, data)
	case optAbort:
		n.reply(option, repAck, nil)
		return left, nil
	case optList:
		return haggling, n.list(ctx, data)
	case optStructuredReply:
		if len(data) > 0 {
			n.refuse(option, repErrInvalid, "option takes no data")
			break
		}
		if n.headers == extendedHeaders {
			n.refuse(option, repErrExtHeader, "extended headers are agreed on already")
			break
		}
		n.headers = structuredHeaders
		n.reply(option, repAck, nil)
	case optExtendedHeaders:
		if len(data) > 0 {
			n.refuse(option, repErrInvalid, "option takes no data")
			break
		}
		n.headers = extendedHeaders
		n.reply(option, repAck, nil)
	case optSetMetaContext, optListMetaContext:
		n.metaContext(ctx, option, data)
	case optStartTLS:
		return haggling, n.startTLS(ctx, data)
	default:
		n.reply(option, repErrUnsupported, nil)
	}
	return haggling, nil
}

func knownOption(option uint32) bool {
	switch option {
	case optExportName, optAbort, optList, optStartTLS, optInfo, optGo,
		optStructuredReply, optListMetaContext, optSetMetaContext, optExtendedHeaders:
		return true
	}
	return false
}

// reply gathers an option reply.
func (n *negotiation) reply(option, kind uint32, data []byte) {
	b := binary.BigEndian.AppendUint64(n.batch, magicReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	b = append(b, data...)
	n.batch = b
}

func (n *negotiation) refuse(option, kind uint32, message string) {
	n.reply(option, kind, []byte(message))
}

// refuseOpen answers for an export that could not be had.
func (n *negotiation) refuseOpen(option uint32, err error) {
	if errors.Is(err, ErrUnknownExport) {
		why := "no such export"
		if n.srv.TLS != nil && !n.client.TLS {
			why += " for clients without TLS" // for whatever name: it is no hint
		}
		n.refuse(option, repErrUnknown, why)
		return
	}
	n.srv.logger().Error("nbd: export not available", "error", err)
	n.refuse(option, repErrUnknown, "export is not available")
}

// exportName answers NBD_OPT_EXPORT_NAME, which knows no error but hanging up.
func (n *negotiation) exportName(ctx context.Context, name string) (outcome, error) {
	if !validString(name) {
		return haggling, fmt.Errorf("%w: bad export name", ErrProtocol)
	}
	if n.headers == extendedHeaders {
		return haggling, fmt.Errorf("%w: EXPORT_NAME with extended headers", ErrProtocol)
	}
	e, isSelected, err := n.openAgain(ctx, name)
	if err != nil {
		return haggling, err
	}
	n.choose(e, isSelected)
	b := binary.BigEndian.AppendUint64(n.batch, uint64(n.size))
	b = binary.BigEndian.AppendUint16(b, n.flags)
	if !n.noZeroes {
		b = append(b, make([]byte, exportNamePadding)...)
	}
	n.batch = b
	return chosen, nil
}

// info answers NBD_OPT_INFO and NBD_OPT_GO.
func (n *negotiation) info(ctx context.Context, option uint32, data []byte) (outcome, error) {
	name, wanted, ok := parseInfo(data)
	switch {
	case !ok:
		n.refuse(option, repErrInvalid, "malformed option")
		return haggling, nil
	case !validString(name):
		n.refuse(option, repErrInvalid, "bad export name")
		return haggling, nil
	}
	e, isSelected, err := n.openAgain(ctx, name)
	if err != nil {
		n.refuseOpen(option, err)
		return haggling, nil
	}
	// Before GO it is not known yet which contexts there will be.
	filters := option == optInfo || isSelected && len(n.selected.contexts) > 0
	if option == optGo {
		n.choose(e, isSelected)
	} else if !isSelected {
		defer e.release()
	}

	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Disk.Size()))
	n.reply(option, repInfo, binary.BigEndian.AppendUint16(b, transmissionFlags(&e, n.headers, filters)))

	preferred := uint32(preferredReadOnly)
	if e.writable() != nil {
		preferred = preferredWritable
	}
	b = binary.BigEndian.AppendUint16(nil, infoBlockSize)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, preferred)
	n.reply(option, repInfo, binary.BigEndian.AppendUint32(b, maxPayload))

	if wanted[infoName] {
		n.reply(option, repInfo, append(binary.BigEndian.AppendUint16(nil, infoName), e.Name...))
	}
	if wanted[infoDescription] && e.Description != "" {
		n.reply(option, repInfo, append(binary.BigEndian.AppendUint16(nil, infoDescription), e.Description...))
	}
	n.reply(option, repAck, nil)
	if option == optGo {
		return chosen, nil
	}
	return haggling, nil
}

// choose fixes the export for the transmission phase, with the contexts that were
// selected for it.
func (n *negotiation) choose(e Export, isSelected bool) {
	c := n.conn
	if isSelected {
		c.contexts, n.selected = n.selected.contexts, selection{}
	}
	c.export = e
	c.decided.Store(true)
	c.disk, c.writable, c.size = e.Disk, e.writable(), e.Disk.Size()
	c.cancelable, _ = e.Disk.(restore.ReaderAtContext)
	if c.out.canSendFile() {
		c.filer, _ = e.Disk.(restore.Filer)
		c.landing, _ = c.writable.(restore.WriteFiler)
	}
	c.flags = transmissionFlags(&e, c.headers, len(c.contexts) > 0)
}

// transmissionFlags tells what an export can do. Flush and FUA are trivially
// true of a read-only one, and some clients send them to any. filters tells that
// there may be metadata contexts to choose from in a block status.
func transmissionFlags(e *Export, h headers, filters bool) uint16 {
	flags := uint16(transHasFlags | transFlush | transFUA | transCache)
	if !e.Moving {
		flags |= transMultiConn
	}
	if e.writable() == nil {
		flags |= transReadOnly
	} else {
		flags |= transTrim | transWriteZeroes | transFastZero
	}
	if h.chunked() {
		flags |= transDF
	}
	if h == extendedHeaders && filters {
		flags |= transBlockStatusPayload
	}
	return flags
}

// list answers NBD_OPT_LIST.
func (n *negotiation) list(ctx context.Context, data []byte) error {
	if len(data) > 0 {
		n.refuse(optList, repErrInvalid, "option takes no data")
		return nil
	}
	exports, err := n.srv.Exports.List(ctx, n.client)
	if err != nil {
		n.srv.logger().Error("nbd: list of exports", "error", err)
		n.refuse(optList, repErrPolicy, "list is not available")
		return nil
	}
	for _, e := range exports {
		if !validString(e.Name) || !validString(e.Description) {
			continue // it could not be asked for either
		}
		b := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		n.reply(optList, repServer, append(append(b, e.Name...), e.Description...))
		if len(n.batch) > batchSize {
			if err := n.flush(); err != nil {
				return err
			}
		}
	}
	n.reply(optList, repAck, nil)
	return nil
}

// parseInfo decodes the data of NBD_OPT_INFO and NBD_OPT_GO.
func parseInfo(p []byte) (name string, wanted map[uint16]bool, ok bool) {
	name, p, ok = cutString(p)
	if !ok || len(p) < 2 {
		return "", nil, false
	}
	count := int(binary.BigEndian.Uint16(p))
	p = p[2:]
	if len(p) != 2*count {
		return "", nil, false
	}
	wanted = map[uint16]bool{}
	for ; len(p) > 0; p = p[2:] {
		if kind := binary.BigEndian.Uint16(p); kind <= infoBlockSize {
			wanted[kind] = true // others MUST be ignored
		}
	}
	return name, wanted, true
}

// cutString takes a string behind its 32-bit length off p.
func cutString(p []byte) (s string, rest []byte, ok bool) {
	if len(p) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(p)
	p = p[4:]
	if uint64(n) > uint64(len(p)) {
		return "", nil, false
	}
	return string(p[:n]), p[n:], true
}
