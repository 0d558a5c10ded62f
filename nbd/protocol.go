package nbd

import "encoding/binary"

// Numbers of the protocol, from sections "Newstyle negotiation", "Values" and
// "Transmission" of the NBD protocol document, those of extended headers from its
// branch extension-ext-header. The wire is big-endian.
const (
	magicServer     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicReply      = 0x3e889045565a9    // option replies
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	magicExtendedRequest = 0x21e41c71
	magicExtendedReply   = 0x6e8a278c
)

// "Handshake flags" and "Client flags".
const (
	flagFixedNewstyle  = 1 << 0
	flagNoZeroes       = 1 << 1
	clientFixed        = 1 << 0
	clientNoZeroes     = 1 << 1
	exportNamePadding  = 124
	clientHelloLength  = 4
	optionHeaderLength = 16
)

// "Option types".
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
	optExtendedHeaders = 11
)

// "Option reply types".
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsupported = 1<<31 + 1
	repErrPolicy      = 1<<31 + 2
	repErrInvalid     = 1<<31 + 3
	repErrTLSRequired = 1<<31 + 5
	repErrUnknown     = 1<<31 + 6
	repErrShutdown    = 1<<31 + 7
	repErrTooBig      = 1<<31 + 9
	repErrExtHeader   = 1<<31 + 10
)

// Information types of NBD_REP_INFO.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// "Transmission flags".
const (
	transHasFlags    = 1 << 0
	transReadOnly    = 1 << 1
	transFlush       = 1 << 2
	transFUA         = 1 << 3
	transRotational  = 1 << 4
	transTrim        = 1 << 5
	transWriteZeroes = 1 << 6
	transDF          = 1 << 7
	transMultiConn   = 1 << 8
	transCache       = 1 << 10
	transFastZero    = 1 << 11

	transBlockStatusPayload = 1 << 12
)

// "Request types".
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// "Command flags".
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4

	cmdFlagPayloadLen = 1 << 5
)

// "Structured reply flags" and "Structured reply types".
const (
	replyFlagDone = 1 << 0

	replyNone        = 0
	replyOffsetData  = 1
	replyOffsetHole  = 2
	replyBlockStatus = 5
	replyError       = 1<<15 + 1

	replyBlockStatusExt = 6
)

// Status flags of the metadata context base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

const (
	requestLength         = 28
	extendedRequestLength = 32

	// The head of a reply chunk: 20 bytes, or 32 with extended headers.
	maxChunkLength    = 32
	offsetChunkLength = maxChunkLength + 8 // the most that comes before the data of a read
	holeChunkLength   = maxChunkLength + 12
)

// request is a decoded request message.
type request struct {
	flags  uint16
	cmd    uint16
	handle uint64 // the client's cookie, sent back as it came
	off    uint64
	length uint64 // compact: 32 bits
}

func (r request) has(flag uint16) bool { return r.flags&flag != 0 }

// decodeRequest decodes requestLength bytes. ok is false if the magic is wrong.
func decodeRequest(p []byte) (r request, ok bool) {
	_ = p[requestLength-1]
	return request{
		flags:  binary.BigEndian.Uint16(p[4:]),
		cmd:    binary.BigEndian.Uint16(p[6:]),
		handle: binary.BigEndian.Uint64(p[8:]),
		off:    binary.BigEndian.Uint64(p[16:]),
		length: uint64(binary.BigEndian.Uint32(p[24:])),
	}, binary.BigEndian.Uint32(p) == magicRequest
}

// decodeExtended decodes extendedRequestLength bytes.
func decodeExtended(p []byte) (r request, ok bool) {
	_ = p[extendedRequestLength-1]
	return request{
		flags:  binary.BigEndian.Uint16(p[4:]),
		cmd:    binary.BigEndian.Uint16(p[6:]),
		handle: binary.BigEndian.Uint64(p[8:]),
		off:    binary.BigEndian.Uint64(p[16:]),
		length: binary.BigEndian.Uint64(p[24:]),
	}, binary.BigEndian.Uint32(p) == magicExtendedRequest
}

// appendSimple appends a simple reply without its data.
func appendSimple(p []byte, handle uint64, e Errno) []byte {
	p = binary.BigEndian.AppendUint32(p, magicSimple)
	p = binary.BigEndian.AppendUint32(p, uint32(e))
	return binary.BigEndian.AppendUint64(p, handle)
}

// headers is the form of a connection's replies, agreed on in the handshake.
type headers uint8

const (
	simpleHeaders     headers = iota // simple replies only
	structuredHeaders                // chunks; simple ones for success without data
	extendedHeaders                  // chunks only, requests and replies with 64-bit lengths
)

// chunked tells whether replies may consist of chunks.
func (h headers) chunked() bool { return h != simpleHeaders }

// appendChunk appends the head of a reply chunk of n payload bytes.
func (h headers) appendChunk(p []byte, flags, kind uint16, r request, n uint32) []byte {
	if h == extendedHeaders {
		p = binary.BigEndian.AppendUint32(p, magicExtendedReply)
	} else {
		p = binary.BigEndian.AppendUint32(p, magicStructured)
	}
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, kind)
	p = binary.BigEndian.AppendUint64(p, r.handle)
	if h == extendedHeaders {
		p = binary.BigEndian.AppendUint64(p, r.off)
		return binary.BigEndian.AppendUint64(p, uint64(n))
	}
	return binary.BigEndian.AppendUint32(p, n)
}

// appendDataChunk appends the head of an OFFSET_DATA chunk of n bytes of data.
func (h headers) appendDataChunk(p []byte, flags uint16, r request, off uint64, n uint32) []byte {
	p = h.appendChunk(p, flags, replyOffsetData, r, n+8)
	return binary.BigEndian.AppendUint64(p, off)
}

// appendHoleChunk appends a whole OFFSET_HOLE chunk.
func (h headers) appendHoleChunk(p []byte, flags uint16, r request, off uint64, n uint32) []byte {
	p = h.appendChunk(p, flags, replyOffsetHole, r, 12)
	p = binary.BigEndian.AppendUint64(p, off)
	return binary.BigEndian.AppendUint32(p, n)
}

// appendErrorChunk appends a whole, final ERROR chunk.
func (h headers) appendErrorChunk(p []byte, r request, e Errno, message string) []byte {
	p = h.appendChunk(p, replyFlagDone, replyError, r, uint32(6+len(message)))
	p = binary.BigEndian.AppendUint32(p, uint32(e))
	p = binary.BigEndian.AppendUint16(p, uint16(len(message)))
	return append(p, message...)
}
