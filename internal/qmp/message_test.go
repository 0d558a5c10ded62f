package qmp

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
)

func FuzzDecoder(f *testing.F) {
	for _, s := range []string{
		`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}`,
		`{"return": {}, "id": 1}` + "\r\n" + `{"return": [], "id": 2}`,
		`{"error": {"class": "GenericError", "desc": "x"}, "id": 18446744073709551615}`,
		`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "SHUTDOWN", "data": {"guest": false}}`,
		`{"return": null, "id": 1}`, `{"id": 1e3, "return": 1}`, `{}`, `[]`, `nul`, "\xff\xfe", strings.Repeat("[", 20000),
	} {
		f.Add([]byte(s))
	}
	const limit = 4 << 10
	f.Fuzz(func(t *testing.T, b []byte) {
		d := newDecoder(bytes.NewReader(b), limit)
		for {
			m, err := d.next()
			if errors.Is(err, io.EOF) && !errors.Is(err, ErrNotQMP) {
				return
			}
			if err != nil {
				if !errors.Is(err, ErrNotQMP) {
					t.Fatalf("error of no known kind: %v", err)
				}
				return
			}
			if m.kind < kindGreeting || m.kind > kindEvent {
				t.Fatalf("message of no kind: %+v", m)
			}
			if m.kind == kindError && m.err == nil || m.kind == kindGreeting && m.greeting == nil {
				t.Fatalf("message without its content: %+v", m)
			}
			if len(m.ret)+len(m.event.Data) > 2*limit {
				t.Fatalf("message of %d bytes passed a limit of %d", len(m.ret)+len(m.event.Data), limit)
			}
		}
	})
}

func TestDecoderRenewsItsAllowance(t *testing.T) {
	one := `{"return": "` + strings.Repeat("x", 900) + `", "id": 1}`
	d := newDecoder(strings.NewReader(strings.Repeat(one, 100)), 1024)
	for i := range 100 {
		if _, err := d.next(); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	if _, err := d.next(); !errors.Is(err, io.EOF) {
		t.Fatalf("got %v, want EOF", err)
	}
}

func TestReturnNullIsAReturn(t *testing.T) {
	m, err := newDecoder(strings.NewReader(`{"return": null, "id": 1}`), 1024).next()
	if err != nil || m.kind != kindReturn {
		t.Fatalf("got %+v, %v", m, err)
	}
}
