package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"time"
	"unicode"
)

// Errors of [Negotiate]; the server's own words are added to them.
var (
	// ErrNotNBD is wrapped when the peer is no NBD server, or one that only
	// speaks the old style, which has no options.
	ErrNotNBD = errors.New("no NBD server that can be used")
	// ErrNeedsTLS is wrapped when the server wants TLS first.
	ErrNeedsTLS = errors.New("the server requires TLS")
	// ErrRefused is wrapped when the server refuses the export for another reason.
	ErrRefused = errors.New("the server refuses")
)

// Remote is what a server says of an export.
type Remote struct {
	Size int64 // bytes

	ReadOnly, Flush, FUA, Trim, WriteZeroes, Rotational bool
	// MultiConn says that several connections see each other's writes and flushes.
	MultiConn bool
	// Flags are these and others as the server sent them, section "Transmission flags".
	Flags uint16

	// Block sizes in bytes, section "Block size constraints". A server that tells none
	// is taken to have 1, 4096 and 32 MiB.
	MinBlock, PreferredBlock, MaxBlock uint32
}

// maxClientReply is the longest option reply that Negotiate reads, in bytes: an information of
// name or description.
const maxClientReply = 2 + maxString

// maxClientReplies is how many replies to one option Negotiate reads.
const maxClientReplies = 64

// Negotiate runs a client's side of the fixed newstyle negotiation up to the
// transmission phase: NBD_OPT_GO, and NBD_OPT_EXPORT_NAME with servers that don't know it. The
// connection then takes requests and gives simple replies, which is what every server has
// and all that the kernel's client understands. It reads no byte beyond the negotiation. It ends
// when ctx does; the connection is the caller's in any case.
//
// Errors wrap [ErrNotNBD], [ErrNeedsTLS], [ErrRefused], [ErrUnknownExport], [ErrProtocol] or are the
// connection's. Section "Fixed newstyle negotiation".
func Negotiate(ctx context.Context, c net.Conn, export string) (_ Remote, err error) {
	if !validString(export) {
		return Remote{}, fmt.Errorf("%w: %.64q", ErrExportName, export)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = c.SetDeadline(time.Unix(1, 0)) // only to wake reads
	})
	defer func() {
		if !stop() {
			<-interrupted
		}
		switch cause := ctx.Err(); {
		case err == nil:
			err = c.SetDeadline(time.Time{}) // it may have ended just now
		case cause != nil:
			err = fmt.Errorf("%w: %w", cause, err)
		}
	}()
	return (&suitor{c}).negotiate(export)
}

// suitor is the client's side of a negotiation. It reads exactly what it needs: what follows
// belongs to whoever uses the connection next.
type suitor struct{ io.ReadWriter }

func (s *suitor) negotiate(export string) (Remote, error) {
	var hello [18]byte
	if _, err := io.ReadFull(s, hello[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return Remote{}, fmt.Errorf("%w: it hung up without a greeting", ErrNotNBD)
		}
		return Remote{}, err
	}
	if binary.BigEndian.Uint64(hello[:]) != magicServer {
		return Remote{}, fmt.Errorf("%w: it greets with %.8q", ErrNotNBD, hello[:8])
	}
	flags := binary.BigEndian.Uint16(hello[16:])
	if binary.BigEndian.Uint64(hello[8:]) != magicOption || flags&flagFixedNewstyle == 0 {
		return Remote{}, fmt.Errorf("%w: it speaks the old protocol only", ErrNotNBD)
	}
	answer := uint32(clientFixed)
	if flags&flagNoZeroes != 0 {
		answer |= clientNoZeroes
	}
	if _, err := s.Write(binary.BigEndian.AppendUint32(nil, answer)); err != nil {
		return Remote{}, err
	}
	r, err := s.goOption(export)
	if errors.Is(err, errUnsupported) {
		return s.exportName(export, flags&flagNoZeroes != 0)
	}
	return r, err
}

var errUnsupported = errors.New("option not supported")

func (s *suitor) option(option uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := s.Write(append(b, data...))
	return err
}

// goOption asks for the export and its block sizes by NBD_OPT_GO.
func (s *suitor) goOption(export string) (Remote, error) {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint16(b, 1)
	if err := s.option(optGo, binary.BigEndian.AppendUint16(b, infoBlockSize)); err != nil {
		return Remote{}, err
	}
	r := Remote{MinBlock: 1, PreferredBlock: 4096, MaxBlock: maxPayload}
	told := false
	for range maxClientReplies { // more would be no answer but a flood
		kind, data, err := s.reply(optGo)
		switch {
		case err != nil:
			return Remote{}, err
		case kind == repAck && !told:
			return Remote{}, fmt.Errorf("%w: the server tells no size", ErrProtocol)
		case kind == repAck:
			return r, nil
		case kind&(1<<31) != 0:
			return Remote{}, refusal(kind, export, data)
		case kind != repInfo || len(data) < 2:
			return Remote{}, fmt.Errorf("%w: reply of type %d and %d bytes", ErrProtocol, kind, len(data))
		}
		switch info, data := binary.BigEndian.Uint16(data), data[2:]; info {
		case infoExport:
			if len(data) != 10 {
				return Remote{}, fmt.Errorf("%w: size of an export in %d bytes", ErrProtocol, len(data))
			}
			if err := r.describe(data); err != nil {
				return Remote{}, err
			}
			told = true
		case infoBlockSize:
			if len(data) != 12 {
				return Remote{}, fmt.Errorf("%w: block sizes in %d bytes", ErrProtocol, len(data))
			}
			r.MinBlock, r.PreferredBlock, r.MaxBlock = binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[4:]), binary.BigEndian.Uint32(data[8:])
			if !powerOfTwo(r.MinBlock) || r.MinBlock > 64<<10 || !powerOfTwo(r.PreferredBlock) ||
				r.PreferredBlock < r.MinBlock || r.MaxBlock < r.MinBlock {
				return Remote{}, fmt.Errorf("%w: block sizes %d, %d, %d", ErrProtocol, r.MinBlock, r.PreferredBlock, r.MaxBlock)
			}
		}
	}
	return Remote{}, fmt.Errorf("%w: more than %d replies", ErrProtocol, maxClientReplies)
}

func powerOfTwo(n uint32) bool { return n != 0 && n&(n-1) == 0 }

// describe reads size and transmission flags.
func (r *Remote) describe(p []byte) error {
	size := binary.BigEndian.Uint64(p)
	if size > math.MaxInt64 {
		return fmt.Errorf("%w: size %d", ErrProtocol, size)
	}
	r.Size, r.Flags = int64(size), binary.BigEndian.Uint16(p[8:])
	if r.Flags&transHasFlags == 0 {
		r.Flags = 0 // section "Transmission flags": the others mean nothing
	}
	has := func(f uint16) bool { return r.Flags&f != 0 }
	r.ReadOnly, r.Flush, r.FUA, r.Trim = has(transReadOnly), has(transFlush), has(transFUA), has(transTrim)
	r.WriteZeroes, r.MultiConn, r.Rotational = has(transWriteZeroes), has(transMultiConn), has(transRotational)
	return nil
}

// reply reads one reply to an option.
func (s *suitor) reply(option uint32) (kind uint32, data []byte, err error) {
	var head [20]byte
	if _, err := io.ReadFull(s, head[:]); err != nil {
		return 0, nil, hungUp(err)
	}
	magic, to := binary.BigEndian.Uint64(head[:]), binary.BigEndian.Uint32(head[8:])
	kind, n := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
	if magic != magicReply || to != option {
		return 0, nil, fmt.Errorf("%w: reply %#x to option %d", ErrProtocol, magic, to)
	}
	if n > maxClientReply {
		return 0, nil, fmt.Errorf("%w: reply of %d bytes", ErrProtocol, n)
	}
	data = make([]byte, n)
	if _, err := io.ReadFull(s, data); err != nil {
		return 0, nil, hungUp(err)
	}
	return kind, data, nil
}

func hungUp(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it hung up during the negotiation", ErrRefused)
	}
	return err
}

// refusal is the error for an error reply, section "Option reply types".
func refusal(kind uint32, export string, message []byte) error {
	var err error
	switch kind {
	case repErrUnsupported:
		return errUnsupported
	case repErrTLSRequired:
		err = ErrNeedsTLS
	case repErrUnknown:
		err = fmt.Errorf("%w %.64q", ErrUnknownExport, export)
	case repErrShutdown:
		err = fmt.Errorf("%w: it is shutting down", ErrRefused)
	case repErrPolicy:
		err = fmt.Errorf("%w by its policy", ErrRefused)
	default:
		err = fmt.Errorf("%w with error %#x", ErrRefused, kind)
	}
	if text := printable(message); text != "" {
		err = fmt.Errorf("%w: it says: %s", err, text)
	}
	return err
}

// printable is what a server said, fit for a terminal.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, strings.ToValidUTF8(string(b[:min(len(b), 512)]), ""))
}

// exportName asks for the export by NBD_OPT_EXPORT_NAME. A server that has none just hangs up.
func (s *suitor) exportName(export string, noZeroes bool) (Remote, error) {
	if err := s.option(optExportName, []byte(export)); err != nil {
		return Remote{}, err
	}
	answer := make([]byte, 10, 10+exportNamePadding)
	if !noZeroes {
		answer = answer[:cap(answer)]
	}
	if _, err := io.ReadFull(s, answer); err != nil {
		if errors.Is(err, io.EOF) {
			return Remote{}, fmt.Errorf("%w %.64q, or it is not available", ErrUnknownExport, export)
		}
		return Remote{}, hungUp(err)
	}
	r := Remote{MinBlock: 1, PreferredBlock: 4096, MaxBlock: maxPayload}
	return r, r.describe(answer)
}
