package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

// fuzzKeys makes the keys of a repository that does not exist: always the same, since the fuzzer's workers
// pass on what others have found.
func fuzzKeys(f *testing.F) (*ring, *keyring) {
	repo := [16]byte{7}
	g, err := newRing(repo)
	if err != nil {
		f.Fatal(err)
	}
	private, err := kem().NewPrivateKey(bytes.Repeat([]byte{3}, 32))
	if err != nil {
		f.Fatal(err)
	}
	g.Identity, g.Signing = key32{1}, &key32{4}
	g.Generations[0].Meta, g.Generations[0].ContentPrivate = key32{2}, (*key32)(bytes.Repeat([]byte{3}, 32))
	g.Generations[0].ContentPublic = private.PublicKey().Bytes()
	k, err := newKeyring(repo, g, 1, nil)
	if err != nil {
		f.Fatal(err)
	}
	return g, k
}

func FuzzDecodeKeyDoc(f *testing.F) {
	g, k := fuzzKeys(f)
	s, o, err := testPassphrase.newSlot(FullKey, k.repo, g.anchor())
	if err != nil {
		f.Fatal(err)
	}
	d := keyDoc{Version: 1, Number: 3, Repository: g.Repository, Created: time.Unix(0, 0).UTC(), Generation: 1, Anchor: g.anchor(), Slots: []slot{s}}
	if err := d.Slots[0].seal(g, &d, k.repo); err != nil {
		f.Fatal(err)
	}
	doc, err := d.encode(g.signer())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte("tidemark-keys 1 \n{}"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		head, body, _ := bytes.Cut(doc, []byte("\n"))
		right := append([]byte("tidemark-keys 1 "+plainHasher.sum(body).String()+string(head[max(0, len(head)-129):])+"\n"), body...)
		for _, p := range [][]byte{doc, right} {
			d, err := decodeKeyDoc(p, 3, k.repo)
			if err != nil {
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
					t.Errorf("neither damaged nor newer: %v", err)
				}
				continue
			}
			if err := d.check(); err != nil || d.Number != 3 {
				t.Errorf("accepted: %+v", d)
			}
			if _, err := o.open(d, k.repo); err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrKey) {
				t.Errorf("open: %v", err)
			}
			for i := range d.Slots {
				if a := d.Slots[i].Argon2; a != nil && a.Memory <= 64 && a.Time <= 2 {
					testPassphrase.open(&d.Slots[i], k.repo)
				}
			}
		}
	})
}

func FuzzDecodeRing(f *testing.F) {
	g, k := fuzzKeys(f)
	for _, r := range []Role{FullKey, WriterKey} {
		b, err := json.Marshal(g.forRole(r))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		g, err := decodeRing(p, k.repo)
		if err != nil {
			return
		}
		if s, err := newRingState(g, 1); err == nil && (s.newest == nil || (s.newest.private == nil) != (g.Signing == nil)) {
			t.Errorf("accepted: %s", p)
		}
	})
}

func FuzzParseKeyFile(f *testing.F) {
	g, k := fuzzKeys(f)
	key, err := NewKeyFile()
	if err != nil {
		f.Fatal(err)
	}
	key.trust[k.repo], key.rings[k.repo] = g.anchor(), g
	text, err := key.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(keyFileMagic + "\n# nothing\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		k, err := ParseKeyFile(p)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("unclassified: %v", err)
			}
			return
		}
		text, err := k.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseKeyFile(text)
		if err != nil || again.seed != k.seed || len(again.trust) != len(k.trust) || len(again.rings) != len(k.rings) {
			t.Errorf("written again as %q: %v", text, err)
		}
	})
}

func FuzzParsePublicKey(f *testing.F) {
	k, err := NewKeyFile()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(k.Public())
	f.Fuzz(func(t *testing.T, p []byte) {
		k, err := ParsePublicKey(p)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("unclassified: %v", err)
			}
			return
		}
		if again, err := ParsePublicKey(k.encode()); err != nil || !bytes.Equal(again, k) {
			t.Errorf("written again: %v", err)
		}
	})
}

// FuzzSealedIndex feeds what only a writer could seal: a header, an index and records of any kind.
func FuzzSealedIndex(f *testing.F) {
	_, k := fuzzKeys(f)
	id := PackID{9}
	for _, kind := range []packKind{kindData, kindNode} {
		b, err := newPackBuilder(nil, kind, id, k.repo, k)
		if err != nil {
			f.Fatal(err)
		}
		b.add([]byte("abcdefgh"), 8, codecRaw, k.ids.sum([]byte("abcdefgh")))
		b.add(text(1, 40), 8, codecZstd, Hash{1})
		doc := bytes.Clone(b.finish())
		at := recordsAt(kind) + 8 + 40 + 2*sealLen
		foot := doc[len(doc)-packFooterLen:]
		index, err := k.newest().indexKey([32]byte(foot[16:48])).open(nil, doc[at:len(doc)-packFooterLen], indexAAD(doc[:recordsAt(kind)], foot))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(doc[:at], index)
	}
	c, err := newCodec()
	if err != nil {
		f.Fatal(err)
	}
	r := &reader{repo: k.repo, keys: k, ids: k.ids, codec: c, bufs: &sync.Pool{New: func() any { return new([]byte) }}}
	f.Fuzz(func(t *testing.T, body, index []byte) {
		if len(body) < packHeaderLen || int64(len(body)) < recordsAt(packKind(body[9])) || len(body) > 1<<20 {
			return
		}
		var foot [packFooterLen]byte
		copy(foot[48:], packEnd)
		binary.LittleEndian.PutUint64(foot[:], uint64(len(body)))
		binary.LittleEndian.PutUint32(foot[8:], uint32(len(index)+sealLen))
		head := body[:recordsAt(packKind(body[9]))]
		sealed := k.newest().indexKey([32]byte(foot[16:48])).seal(nil, index, indexAAD(head, foot[:]))
		x, err := openPackIndex(head, sealed, foot[:], int64(len(body)+len(sealed)+packFooterLen), id, k.repo, k.newest())
		if err != nil {
			return
		}
		for ord := range min(x.count(), 20) {
			e, _ := x.entry(uint32(ord))
			if e.absent() {
				continue
			}
			stored := body[e.off : e.off+e.stored]
			e.crc = castagnoli(stored)
			dst := make([]byte, e.raw)
			ref := Ref{Hash: e.hash, Pack: id, Ord: uint32(ord)}
			err := r.decode(x, ref, e, stored, dst)
			switch {
			case err == nil && k.ids.sum(dst) != ref.Hash:
				t.Error("unchecked bytes left the store")
			case err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion):
				t.Errorf("record %d: %v", ord, err)
			}
		}
	})
}

// FuzzSealedPack feeds whole objects.
func FuzzSealedPack(f *testing.F) {
	_, k := fuzzKeys(f)
	id := PackID{9}
	b, err := newPackBuilder(nil, kindNode, id, k.repo, k)
	if err != nil {
		f.Fatal(err)
	}
	b.add([]byte("abc"), 3, codecRaw, k.ids.sum([]byte("abc")))
	whole := bytes.Clone(b.finish())
	f.Add(whole)
	c, err := newCodec()
	if err != nil {
		f.Fatal(err)
	}
	dir, err := blob.CreateDir(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	wantSeed(f, &oneObject{dir, whole}, k.repo, c, k, id)
	f.Fuzz(func(t *testing.T, p []byte) {
		r, err := newReader(&oneObject{dir, p}, k.repo, c, k)
		if err != nil {
			t.Fatal(err)
		}
		x, err := r.index(t.Context(), id)
		switch {
		case err == nil && (len(p) != len(whole) || x.count() != 1):
			t.Error("an index that was not sealed here is taken")
		case err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion):
			t.Errorf("neither damaged nor newer: %v", err)
		}
	})
}

func FuzzSealedDocument(f *testing.F) {
	_, k := fuzzKeys(f)
	whole := k.sealDoc("points/a", []byte("document"))
	f.Add(whole, []byte("\x03\x00\x00\x00abc\x00\x00"))
	f.Fuzz(func(t *testing.T, sealed, plain []byte) {
		doc, err := k.openDoc(t.Context(), nil, "points/a", sealed)
		if err == nil && string(doc) != "document" {
			t.Errorf("%x was not sealed here", sealed)
		}
		if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
			t.Errorf("neither damaged nor newer: %v", err)
		}
		if doc, err = unpad(plain); err == nil && !bytes.HasPrefix(plain[4:], doc) {
			t.Errorf("%x is not in %x", doc, plain)
		}
	})
}

func FuzzHiddenName(f *testing.F) {
	_, k := fuzzKeys(f)
	f.Add(k.hideName("web-1"))
	f.Add("web-1")
	f.Fuzz(func(t *testing.T, s string) {
		if name, ok := k.showName(s); ok && k.hideName(name) != s {
			t.Errorf("%q is shown as %q", s, name)
		}
	})
}
