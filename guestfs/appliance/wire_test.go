package appliance

import (
	"bytes"
	"testing"
)

// FuzzAnswers reads what a guest that has taken over its appliance may say.
func FuzzAnswers(f *testing.F) {
	var e encoder
	e.uint(1)
	e.int(7)
	f.Add(e.b)
	f.Add(fail(failMount, 0, "why"))
	f.Add([]byte{0, 1, 2, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &request{op: opLstat, volume: "p1", path: "x"}
		if _, _, err := readFrame(bytes.NewReader(b)); err == nil && len(b) < 12 {
			t.Error("a frame without a head")
		}
		body, err := answer(b, r)
		if err != nil {
			return
		}
		if p, err := decodeDirPage(body); err == nil {
			for _, x := range p.entries {
				if !validName(x.Name) || !validType(x.Attr.Mode) {
					t.Errorf("entry %+v", x)
				}
			}
		}
		if vs, err := decodeVolumes(body); err == nil {
			for _, v := range vs {
				if !validName(v.Name) {
					t.Errorf("volume %+v", v)
				}
			}
		}
		_, _ = decodeXattrs(body)
		p := make([]byte, 64)
		if n, err := decodeRead(body, p); err == nil && n > len(p) {
			t.Errorf("read %d bytes", n)
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add((&request{op: opRead, volume: "p1", path: "a/b", off: 1, n: 2}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRequest(b)
		if err != nil {
			return
		}
		again, err := decodeRequest(r.encode())
		if err != nil || again != r {
			t.Errorf("%+v became %+v, %v", r, again, err)
		}
	})
}
