package guestfs

import (
	"bytes"
	"testing"
	"unicode/utf8"
)

func FuzzProbe(f *testing.F) {
	for _, magic := range []struct {
		off int
		s   string
	}{{0, "LUKS\xba\xbe"}, {512, "LABELONE"}, {0x10040, "_BHRfS_M"}, {0, "XFSB"}, {1080, "\x53\xef"}, {3, "NTFS    "}, {4086, "SWAPSPACE2"}, {82, "FAT32   "}} {
		b := make([]byte, magic.off+len(magic.s))
		copy(b[magic.off:], magic.s)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := Probe(bytes.NewReader(b), int64(len(b)))
		if err != nil || v.Kind == "" || !utf8.ValidString(v.Label+v.UUID) {
			t.Errorf("%+v, %v", v, err)
		}
	})
}

func TestProbeKinds(t *testing.T) {
	at := func(off int, s string) []byte {
		b := make([]byte, probeBytes)
		copy(b[off:], s)
		return b
	}
	ext := func(compat, incompat byte, state byte) []byte {
		b := at(1080, "\x53\xef")
		b[1024+0x5c], b[1024+0x60], b[1024+0x3a] = compat, incompat, state
		return b
	}
	for name, c := range map[string]struct {
		b           []byte
		kind, state string
	}{
		"luks":        {at(0, "LUKS\xba\xbe"), "luks", NotFiles},
		"xfs":         {at(0, "XFSB"), "xfs", NoState},
		"ext2":        {ext(0, 2, 1), "ext2", Clean},
		"ext3":        {ext(4, 2, 1), "ext3", Clean},
		"ext4":        {ext(4, 0x42, 1), "ext4", Clean},
		"dirty ext4":  {ext(4, 0x46, 1), "ext4", Dirty},
		"ext2 in use": {ext(0, 2, 0), "ext2", Dirty},
		"zeroes":      {at(0, ""), "unknown", NotFiles},
	} {
		v, err := Probe(bytes.NewReader(c.b), int64(len(c.b)))
		if err != nil || v.Kind != c.kind || v.State != c.state {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
}
