package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

func FuzzDecodeNode(f *testing.F) {
	var c [fanOut]Ref
	c[0] = Ref{Hash: Hash{1}, Pack: PackID{1}, Ord: 1}
	f.Add(encodeNode(0, &c))
	for i := range c {
		c[i] = Ref{Hash: Hash{byte(i)}, Pack: PackID{byte(i % 5)}, Ord: uint32(i)}
	}
	f.Add(encodeNode(3, &c))
	f.Add([]byte("TMN\x01"))
	f.Fuzz(func(t *testing.T, p []byte) {
		n, err := decodeNode(p)
		if err != nil {
			return
		}
		var c [fanOut]Ref
		for i := range c {
			c[i] = n.child(i)
		}
		if !bytes.Equal(encodeNode(n.level, &c), p) {
			t.Errorf("%x is decoded, but encoded otherwise", p)
		}
	})
}

// FuzzPack feeds whole objects to the reader. The hash of the index is made
// right, or the fuzzer would never get past it.
func FuzzPack(f *testing.F) {
	repo, id := [16]byte{7}, PackID{9}
	dir, err := blob.CreateDir(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	nodes, err := newPackBuilder(nil, kindNode, id, repo, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(nodes.finish())
	b, err := newPackBuilder(nil, kindData, id, repo, nil)
	if err != nil {
		f.Fatal(err)
	}
	b.add([]byte("abc"), 3, codecRaw, plainHasher.sum([]byte("abc")))
	c, err := newCodec()
	if err != nil {
		f.Fatal(err)
	}
	raw, buf := text(1, 5000), new([]byte)
	z, how, err := c.compress(buf, raw)
	if err != nil {
		f.Fatal(err)
	}
	b.add(z, len(raw), how, plainHasher.sum(raw))
	whole := b.finish()
	f.Add(whole)
	wantSeed(f, &oneObject{dir, whole}, repo, c, nil, id)
	f.Fuzz(func(t *testing.T, p []byte) {
		if n := len(p) - packFooterLen; n >= packHeaderLen {
			if ft, err := parsePackFooter(p[n:], int64(len(p)), false); err == nil {
				h := packHash(p[:packHeaderLen], p[ft.indexOff:n], p[n:])
				copy(p[n+16:], h[:])
			}
		}
		r, err := newReader(&oneObject{dir, p}, repo, c, nil)
		if err != nil {
			t.Fatal(err)
		}
		x, err := r.index(t.Context(), id)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Errorf("neither damaged nor newer: %v", err)
			}
			return
		}
		for ord := range min(x.count(), 100) {
			e, _ := x.entry(uint32(ord))
			ref := Ref{Hash: e.hash, Pack: id, Ord: uint32(ord)}
			if x.kind == kindNode {
				_, err = r.node(t.Context(), ref, 0)
			} else {
				dst := make([]byte, e.raw)
				if err = r.grain(t.Context(), ref, dst); err == nil && plainHasher.sum(dst) != ref.Hash {
					t.Error("unchecked bytes left the store")
				}
			}
			if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Errorf("record %d: %v", ord, err)
			}
		}
	})
}

// wantSeed makes sure that the fuzzer begins with something that is read.
func wantSeed(f *testing.F, b blob.Store, repo [16]byte, c *codec, k *keyring, id PackID) {
	r, err := newReader(b, repo, c, k)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := r.index(f.Context(), id); err != nil {
		f.Fatalf("the seed is not read: %v", err)
	}
}

// FuzzRecord feeds hostile stored bytes to decompression.
func FuzzRecord(f *testing.F) {
	c, err := newCodec()
	if err != nil {
		f.Fatal(err)
	}
	for _, raw := range [][]byte{text(1, 4096), make([]byte, 65536), noise(1, 100)} {
		buf := new([]byte)
		z, how, err := c.compress(buf, raw)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(bytes.Clone(z), how, uint32(len(raw)))
	}
	f.Fuzz(func(_ *testing.T, z []byte, how byte, n uint32) {
		// A guard behind dst shows writes past it.
		n = 1 + n%MaxGrain
		space := make([]byte, int(n)+64)
		for i := n; i < n+64; i++ {
			space[i] = 0xa5
		}
		_ = c.decompress(space[:n:n], z, how)
		for i := n; i < n+64; i++ {
			if space[i] != 0xa5 {
				panic("written past the end")
			}
		}
	})
}

// oneObject is a store in which every object has the same bytes.
type oneObject struct {
	*blob.Dir
	p []byte
}

func (o *oneObject) Stat(_ context.Context, name string) (blob.Info, error) {
	return blob.Info{Name: name, Size: int64(len(o.p))}, nil
}

func (o *oneObject) ReadTail(_ context.Context, _ string, p []byte) (int, int64, error) {
	n := copy(p, o.p[len(o.p)-min(len(p), len(o.p)):])
	return n, int64(len(o.p)), nil
}

func (o *oneObject) ReadAt(_ context.Context, _ string, p []byte, off int64) (int, error) {
	if off < 0 || off > int64(len(o.p)) {
		return 0, io.EOF
	}
	n := copy(p, o.p[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func FuzzDecodePoint(f *testing.F) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	p := testPoint("disk0")
	p.VM, p.Time = "a", at
	p.Disks[0].Root = Root{Size: 1 << 30, Grain: DefaultGrain, Level: 2, Ref: Ref{Hash: Hash{1}, Pack: PackID{2}, Ord: 3}}
	doc, _, err := encodePoint(&p, plainHasher)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte("tidemark-point 1 \n{}"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		// With a right hash and without.
		_, body, _ := bytes.Cut(doc, []byte("\n"))
		h := plainHasher.sum(body).String()
		n := PointName{VM: "a", ID: h[:16], Time: at}
		for _, d := range [][]byte{doc, append([]byte("tidemark-point 1 "+h+"\n"), body...)} {
			p, err := decodePoint(d, "points/a/x", n, plainHasher)
			switch {
			case err == nil:
				if p.validate() != nil || p.Name() != n {
					t.Errorf("accepted: %+v", p)
				}
			case !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion):
				t.Errorf("neither damaged nor newer: %v", err)
			}
		}
	})
}

func FuzzPointName(f *testing.F) {
	f.Add("points/a/20260102T030405.000000006Z-0123456789abcdef")
	f.Add("points/a/20260102T030405,000000006Z-0123456789abcdef")
	r := &reader{}
	f.Fuzz(func(t *testing.T, s string) {
		if n, ok := r.parsePointName(s); ok && (r.pointObject(n) != s || !blob.ValidName(s)) {
			t.Errorf("%q is read as %+v", s, n)
		}
	})
}

func FuzzDecodeConfig(f *testing.F) {
	c := config{Format: configFormat, Version: 1, ID: "00112233445566778899aabbccddeeff", Hash: "blake3", Encryption: encryption{encryptionNone}}
	doc, err := encodeConfig(c)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte(`{"format":"tidemark-repo"}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := decodeConfig(p)
		if err == nil {
			if c.Version != 1 || binary.Size(c.id()) != 16 || len(c.ID) != 32 {
				t.Errorf("accepted: %+v", c)
			}
		} else if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) && !errors.Is(err, ErrNotRepository) {
			t.Errorf("unclassified: %v", err)
		}
	})
}

func FuzzUserTime(f *testing.F) {
	f.Add("2026-01-02T03-04-05Z")
	f.Add("2026-01-02T03:04:05+01:00")
	f.Fuzz(func(_ *testing.T, s string) { _, _ = parseUserTime(s) })
}
