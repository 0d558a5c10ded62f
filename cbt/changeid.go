package cbt

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ErrChangeID is wrapped when a text is not a change ID.
var ErrChangeID = errors.New("not a change ID")

// ChangeID names the end of one epoch of one tracking of one device:
// everything up to there is in the point that carries it. The zero value names
// no instant.
type ChangeID struct {
	registration string
	epoch        uint64
}

// IsZero tells whether id names no instant.
func (id ChangeID) IsZero() bool { return id == ChangeID{} }

// String is what ParseChangeID reads.
func (id ChangeID) String() string {
	if id.IsZero() {
		return ""
	}
	return fmt.Sprintf("%s.%d", id.registration, id.epoch)
}

// ParseChangeID reads what String wrote; the empty text is the zero ChangeID.
// Errors wrap ErrChangeID.
func ParseChangeID(s string) (ChangeID, error) {
	if s == "" {
		return ChangeID{}, nil
	}
	reg, num, ok := strings.Cut(s, ".")
	if !ok || len(reg) != 32 || strings.Trim(reg, "0123456789abcdef") != "" {
		return ChangeID{}, fmt.Errorf("%w: %.80q", ErrChangeID, s)
	}
	n, err := strconv.ParseUint(num, 10, 64)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != num {
		return ChangeID{}, fmt.Errorf("%w: %.80q", ErrChangeID, s)
	}
	return ChangeID{reg, n}, nil
}
