package store

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// The codec byte of a record: the low nibble says how it is compressed, the high
// one how it is sealed: all or none of a repository's are.
const (
	codecRaw  = 0x00
	codecZstd = 0x01
	codecGCM  = 0x10

	codecAbsent = 0x0f // no compression: the record was dropped, see docs/format.md

	codecCompression = 0x0f
	codecSeal        = 0xf0
)

// codec compresses and decompresses records. Safe for concurrent use; as many
// calls run at once as there are processors.
type codec struct {
	encoder func() (*zstd.Encoder, error) // made on first use: readers need none
	decoder *zstd.Decoder
	scratch *sync.Pool // *[]byte
}

// decodeSlack is what the decoder wants to be able to write past the content, in bytes: it copies a fifth
// faster then. That may be nobody's memory, so it is in a buffer of ours.
const decodeSlack = 16

func newCodec() (*codec, error) {
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(0),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(MaxGrain),
		zstd.WithDecoderMaxWindow(MaxGrain),
		// The space given is the limit, whatever the frame claims.
		zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	return &codec{
		decoder: dec,
		scratch: &sync.Pool{New: func() any { return new([]byte) }},
		encoder: sync.OnceValues(func() (*zstd.Encoder, error) {
			return zstd.NewWriter(nil,
				// About zstd -3. Against the fastest level: half the speed and 4 % less stored of a disk
				// of system files; the next level up would halve it again for 2 %. Entropy coding
				// alone, where nothing repeats, is another 1 %.
				zstd.WithEncoderLevel(zstd.SpeedDefault),
				zstd.WithAllLitEntropyCompression(true),
				zstd.WithWindowSize(MaxGrain),
				zstd.WithLowerEncoderMem(true),
				zstd.WithEncoderCRC(false)) // every record is hashed and has a CRC of its own
		}),
	}, nil
}

func (c *codec) close() { c.decoder.Close() }

// compress returns raw compressed, or raw itself if that is not smaller, and the
// codec byte. It uses and may replace *buf.
func (c *codec) compress(buf *[]byte, raw []byte) ([]byte, byte, error) {
	enc, err := c.encoder()
	if err != nil {
		return nil, 0, fmt.Errorf("make zstd encoder: %w", err)
	}
	if most := enc.MaxEncodedSize(len(raw)); cap(*buf) < most {
		*buf = make([]byte, 0, most)
	}
	out := enc.EncodeAll(raw, (*buf)[:0])
	if len(out) >= len(raw) {
		return raw, codecRaw, nil
	}
	return out, codecZstd, nil
}

var errWrongLength = errors.New("decompresses to another length than the index says")

// decompress fills dst from stored. It never writes more than len(dst), nor allocates
// more than that and decodeSlack for content.
func (c *codec) decompress(dst, stored []byte, how byte) error {
	switch how {
	case codecRaw:
		if len(stored) != len(dst) {
			return errWrongLength
		}
		copy(dst, stored)
		return nil
	case codecZstd:
		buf := c.scratch.Get().(*[]byte)
		defer c.scratch.Put(buf)
		most := len(dst) + decodeSlack
		if cap(*buf) < most {
			*buf = make([]byte, 0, most)
		}
		out, err := c.decoder.DecodeAll(stored, (*buf)[:0:most])
		if err != nil {
			return err
		}
		if len(out) != len(dst) {
			return errWrongLength
		}
		copy(dst, out)
		return nil
	}
	return fmt.Errorf("%w: codec %#02x", ErrVersion, how)
}
