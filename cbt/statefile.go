package cbt

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/tidemark/tidemark/bpf"
)

// ErrState is wrapped when a saved state can't be read.
var ErrState = errors.New("the saved state is damaged or of another version")

// A state file is: 8 bytes of magic; the length of the header, 32 bits; the header, JSON; the
// bitmap, 64-bit words; SHA-256 of all before. Numbers are little-endian. It is read by the
// version that wrote it and later ones; a change that they would misread changes the magic.
const (
	stateMagic     = "TIDESAV1"
	maxStateHeader = 64 << 10
)

// stateHeader is what the file says beside the bitmap.
type stateHeader struct {
	Device  string    `json:"device"`          // bpf.Identity.Name
	Proof   string    `json:"proof,omitempty"` // bpf.Identity.Proof
	SavedAt time.Time `json:"saved_at"`
	Boot    string    `json:"boot"`

	Registration string     `json:"registration"`
	First        uint64     `json:"first_epoch"`
	Last         uint64     `json:"last_epoch"`
	Shift        uint       `json:"granule_shift"`
	Size         int64      `json:"size"`
	Table        uint64     `json:"table,omitempty"`
	Opened       time.Time  `json:"opened"`
	Closed       time.Time  `json:"closed"`
	Missed       bpf.Misses `json:"missed"`
	Sectors      uint64     `json:"sectors_written"`
	Landed       uint64     `json:"sectors_completed"`
	Kernel       uint64     `json:"kernel_sectors,omitempty"`
	KernelCounts bool       `json:"kernel_counts,omitempty"`
}

// savedState is a decoded file.
type savedState struct {
	stateHeader
	bitmap []uint64
}

func (s *savedState) encode() ([]byte, error) {
	h, err := json.Marshal(s.stateHeader)
	if err != nil {
		return nil, err
	}
	if len(h) > maxStateHeader {
		return nil, fmt.Errorf("a header of %d bytes", len(h))
	}
	le := binary.LittleEndian
	b := make([]byte, 0, len(stateMagic)+4+len(h)+8*len(s.bitmap)+sha256.Size)
	b = append(b, stateMagic...)
	b = le.AppendUint32(b, uint32(len(h)))
	b = append(b, h...)
	for _, w := range s.bitmap {
		b = le.AppendUint64(b, w)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...), nil
}

// decodeState reads what encode wrote. Errors wrap ErrState.
func decodeState(b []byte) (*savedState, error) {
	bad := func(why string) (*savedState, error) { return nil, fmt.Errorf("%w: %s", ErrState, why) }
	if len(b) < len(stateMagic)+4+sha256.Size || string(b[:len(stateMagic)]) != stateMagic {
		return bad("it does not begin as one")
	}
	body, sum := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return bad("checksum")
	}
	rest := body[len(stateMagic):]
	n := binary.LittleEndian.Uint32(rest)
	rest = rest[4:]
	if n > maxStateHeader || int(n) > len(rest) {
		return bad("length of the header")
	}
	s := &savedState{}
	d := json.NewDecoder(bytes.NewReader(rest[:n]))
	d.DisallowUnknownFields()
	if err := d.Decode(&s.stateHeader); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return bad("header")
	}
	rest = rest[n:]
	switch {
	case s.Shift < bpf.MinGranuleShift || s.Shift > bpf.MaxGranuleShift || s.Size <= 0:
		return bad("size or granule")
	case s.First == 0 || s.Last < s.First || s.Last == ^uint64(0):
		return bad("epochs")
	case s.Device == "" || s.Boot == "":
		return bad("it names no device or no boot")
	}
	words := (uint64(s.Size-1)>>s.Shift)/64 + 1
	if uint64(len(rest)) != words*8 {
		return bad("length of the bitmap")
	}
	if _, err := ParseChangeID((ChangeID{s.Registration, s.Last}).String()); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	s.bitmap = make([]uint64, words)
	for i := range s.bitmap {
		s.bitmap[i] = binary.LittleEndian.Uint64(rest[8*i:])
	}
	return s, nil
}
