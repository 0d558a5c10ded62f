package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"
)

// DefaultMaxMessage bounds one message of the peer, in bytes. The largest
// known honest ones (query-qmp-schema) stay below 1 MiB.
const DefaultMaxMessage = 4 << 20

// Version is QEMU's version as told in its greeting.
type Version struct {
	Major, Minor, Micro int
	Package             string // the distributor's own, may be empty
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// Event is something that QEMU tells without being asked.
type Event struct {
	Name string          // "STOP", "RESUME", "SHUTDOWN", ...
	Data json.RawMessage // its arguments, nil if there are none
	Time time.Time       // QEMU's clock; zero if QEMU could not tell
}

type greeting struct {
	Version struct {
		QEMU struct {
			Major int `json:"major"`
			Minor int `json:"minor"`
			Micro int `json:"micro"`
		} `json:"qemu"`
		Package string `json:"package"`
	} `json:"version"`
}

// kind says which of the four things the server sends a message is.
type kind int

const (
	kindGreeting kind = iota + 1
	kindReturn
	kindError
	kindEvent
)

// message is anything that the server sends, checked to be exactly one kind.
type message struct {
	kind     kind
	greeting *greeting
	id       uint64 // of replies, if hasID
	hasID    bool   // an error about unreadable input has no ID
	ret      json.RawMessage
	err      *Error
	event    Event
}

// decoder cuts a byte stream into messages.
type decoder struct {
	lim *allowance
	dec *json.Decoder
}

func newDecoder(r io.Reader, limit int) *decoder {
	lim := &allowance{r: r, limit: limit}
	return &decoder{lim: lim, dec: json.NewDecoder(lim)}
}

// next reads one message. io.EOF means a clean end between two messages; all
// other errors that are not the reader's own wrap ErrNotQMP.
func (d *decoder) next() (message, error) {
	// What was read ahead counted for the message before, so at most twice the
	// limit is ever held.
	d.lim.left = d.lim.limit
	var wire struct {
		QMP       *greeting       `json:"QMP"`
		Return    json.RawMessage `json:"return"`
		Error     *Error          `json:"error"`
		Event     string          `json:"event"`
		Data      json.RawMessage `json:"data"`
		ID        json.RawMessage `json:"id"`
		Timestamp struct {
			Seconds      int64 `json:"seconds"`
			Microseconds int64 `json:"microseconds"`
		} `json:"timestamp"`
	}
	if err := d.dec.Decode(&wire); err != nil {
		var syntax *json.SyntaxError
		var typ *json.UnmarshalTypeError
		switch {
		case errors.Is(err, ErrTooLarge), errors.As(err, &syntax), errors.As(err, &typ),
			errors.Is(err, io.ErrUnexpectedEOF):
			return message{}, fmt.Errorf("%w: %w", ErrNotQMP, err)
		}
		return message{}, err
	}

	var m message
	kinds := 0
	if wire.QMP != nil {
		m.kind, m.greeting = kindGreeting, wire.QMP
		kinds++
	}
	if wire.Return != nil {
		m.kind, m.ret = kindReturn, wire.Return
		kinds++
	}
	if wire.Error != nil {
		m.kind, m.err = kindError, wire.Error
		kinds++
	}
	if wire.Event != "" {
		m.kind = kindEvent
		m.event = Event{Name: wire.Event, Data: wire.Data}
		// QEMU sends -1 when it could not read the clock.
		if wire.Timestamp.Seconds > 0 {
			m.event.Time = time.Unix(wire.Timestamp.Seconds, wire.Timestamp.Microseconds*1000)
		}
		kinds++
	}
	if kinds != 1 {
		return message{}, fmt.Errorf("%w: message is not exactly one of greeting, return, error and event", ErrNotQMP)
	}
	if wire.ID != nil {
		id, err := strconv.ParseUint(string(wire.ID), 10, 64)
		if err != nil {
			return message{}, fmt.Errorf("%w: reply to an ID that was never sent", ErrNotQMP)
		}
		m.id, m.hasID = id, true
	}
	return m, nil
}

// encode makes the bytes of a command. The line end is not required by the
// protocol, but makes traces readable.
func encode(cmd string, args any, id uint64) ([]byte, error) {
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{cmd, args, id})
	if err != nil {
		return nil, fmt.Errorf("qmp: arguments of %s: %w", cmd, err)
	}
	return append(b, '\r', '\n'), nil
}

// allowance is a reader that gives out a renewable number of bytes.
type allowance struct {
	r     io.Reader
	limit int
	left  int
}

func (a *allowance) Read(p []byte) (int, error) {
	if a.left == 0 {
		return 0, fmt.Errorf("%w (limit %d bytes)", ErrTooLarge, a.limit)
	}
	if len(p) > a.left {
		p = p[:a.left]
	}
	n, err := a.r.Read(p)
	a.left -= n
	return n, err
}
